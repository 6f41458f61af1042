import dataclasses
import functools
import os
import pty
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from phi3_jax.infer import Sampling, Timings, generate, stream
from phi3_jax.infer.stopping import StopWatch

import phi3_jax

PROMPTS = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8], [90, 4, 77, 15, 60, 3, 22, 9, 41, 13, 58, 6, 70]]


def without_cache(checkpoint: phi3_jax.Checkpoint, prompt: list[int], count: int) -> list[int]:
    """The obvious greedy decoder: runs everything anew for every token (padded to 64, to compile once)."""
    ids = list(prompt)
    for _ in range(count):
        tokens = jnp.asarray([ids + [0] * (64 - len(ids))])
        positions = jnp.where(jnp.arange(64) < len(ids), jnp.arange(64), -1)[None]
        logits = run(checkpoint.config, checkpoint.params, tokens, positions)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, positions):
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, positions)


@pytest.fixture(scope="module")
def greedy(tiny):
    return [without_cache(tiny, prompt, 24) for prompt in PROMPTS]


def test_equals_decoding_without_a_cache_alone_and_in_a_ragged_batch(tiny, greedy):
    """Past LongRoPE's border at 16 tokens, which the three rows cross at different steps, and the window of 19."""
    alone = [generate(tiny, prompt, max_new_tokens=24)[0].token_ids for prompt in PROMPTS]
    assert alone == greedy
    assert [result.token_ids for result in generate(tiny, PROMPTS, max_new_tokens=24)] == greedy


def test_a_prompt_that_is_already_long(tiny):
    prompt = list(np.random.default_rng(0).integers(0, 97, 29))
    assert generate(tiny, prompt, max_new_tokens=7)[0].token_ids == without_cache(tiny, prompt, 7)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_reading_prompts_in_chunks_through_a_ring_changes_nothing(tiny, greedy, chunk):
    """Window 19, prompts of 3 to 13 tokens and 24 more: the ring wraps, also when the border is crossed."""
    narrow = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, sliding_window=7))
    expected = [without_cache(narrow, prompt, 24) for prompt in PROMPTS]
    assert expected != greedy
    got = generate(narrow, PROMPTS, max_new_tokens=24, prefill_chunk=chunk)
    assert [result.token_ids for result in got] == expected


def test_an_int8_cache_is_close_enough_for_the_same_words(demo):
    prompts = ["The capital of France is", "Water boils at", "The opposite of hot is"]
    exact = generate(demo, prompts, max_new_tokens=8)
    small = generate(demo, prompts, max_new_tokens=8, cache_dtype="int8")
    assert [result.token_ids for result in small] == [result.token_ids for result in exact]


def test_stops_at_every_end_id_and_keeps_it(tiny, greedy):
    ends = (greedy[0][5], greedy[1][2])
    checkpoint = dataclasses.replace(tiny, generation=phi3_jax.GenerationSettings(ends))
    for result, full in zip(generate(checkpoint, PROMPTS, max_new_tokens=24), greedy, strict=True):
        stop = next((i for i, token in enumerate(full) if token in ends), None)
        assert result.token_ids == (full if stop is None else full[: stop + 1])
        assert result.finish_reason == ("length" if stop is None else "stop")


def test_ends_at_the_models_context(tiny):
    prompt = [int(token) for token in np.random.default_rng(1).integers(0, 97, 59)]
    (result,) = generate(tiny, prompt, max_new_tokens=24)
    assert result.token_ids == without_cache(tiny, prompt, 5)
    assert result.finish_reason == "length"


def test_streamed_steps_concatenate_to_the_batch(tiny, greedy):
    rows = [[], [], []]
    for new in stream(tiny, PROMPTS, 24, steps=1):
        assert all(len(tokens) <= 1 for tokens in new)
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    assert rows == greedy


def test_one_seed_reproduces_and_another_differs(tiny):
    def draw(seed):
        return [result.token_ids for result in generate(tiny, PROMPTS, max_new_tokens=9, temperature=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    rows = draw(1)
    assert generate(tiny, PROMPTS[0], max_new_tokens=9, temperature=1.0, seed=1)[0].token_ids == rows[0]


def test_one_bucket_compiles_once(tiny):
    from phi3_jax.infer import decoding

    generate(tiny, [7] * 9, max_new_tokens=3)
    programs = (decoding.read, decoding.answer, decoding.decode)
    before = [program._cache_size() for program in programs]
    for length, limit in ((9, 3), (10, 5), (15, 2)):
        generate(tiny, [7] * length, max_new_tokens=limit)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 64], {}, "prompt 0 has 64 tokens, which leaves no room"),
        ([[1, 97]], {}, r"ids \[97\] outside of the vocabulary of 97"),
        ([[-1]], {}, r"ids \[-1\] outside"),
        ("text", {}, "the checkpoint has no tokenizer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk=0"),
        ([[1]], {"cache_dtype": "int4"}, "cache_dtype='int4'"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_input(tiny, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny, prompt, **options)


def test_no_prompts_give_no_answers(tiny):
    assert generate(tiny, []) == []


def test_timings_are_filled_in(tiny):
    timings = Timings()
    list(stream(tiny, [[1, 2, 3]], 5, timings=timings))
    assert timings.prefill > 0
    assert timings.decode > 0


def test_each_row_has_its_own_sampling(tiny, greedy):
    """One batch of a forced, a drawing and a banned row: each as it would be alone."""
    rows = [
        Sampling(forced_tokens=[7, 8]),
        Sampling(temperature=1.0, top_k=5, seed=3),
        Sampling(banned_tokens=[greedy[2][0]], no_repeat_ngram_size=2),
    ]
    together = [result.token_ids for result in generate(tiny, PROMPTS, max_new_tokens=12, sampling=rows)]
    alone = [
        generate(tiny, prompt, max_new_tokens=12, sampling=row)[0].token_ids
        for prompt, row in zip(PROMPTS, rows, strict=True)
    ]
    assert together == alone
    assert together[0][:2] == [7, 8]
    assert together[1] != greedy[1][:12]
    assert greedy[2][0] not in together[2]


def test_sampling_is_said_once_and_for_every_row(tiny):
    with pytest.raises(ValueError, match="inside of sampling"):
        generate(tiny, PROMPTS, temperature=1.0, sampling=Sampling())
    with pytest.raises(ValueError, match="2 samplings for 3 prompts"):
        generate(tiny, PROMPTS, sampling=[Sampling(), Sampling()])
    with pytest.raises(ValueError, match="tokens \\[97\\] outside"):
        generate(tiny, PROMPTS, sampling=Sampling(banned_tokens=[97]))


@pytest.mark.parametrize("stops", [["cat"], ["cat", "at"], ["b", "catcat"], ["zz"], ["\n\n", "abcat"]])
def test_stop_strings_however_the_text_is_cut(stops):
    text = "a ca cab abcat catcat\n\nend"
    wanted = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
    for size in (1, 2, 3, 7, 100):
        watch, passed = StopWatch(stops), ""
        for i in range(0, len(text), size):
            passed += watch.push(text[i : i + size])
            assert wanted.startswith(passed)
        assert passed + watch.flush() == wanted
        assert watch.stopped == (wanted != text)


# The demo's real weights.


def test_a_stop_string_across_tokens_is_trimmed(demo):
    (whole,) = generate(demo, "The capital of France is", max_new_tokens=16)
    stop = whole.text[3:10]
    pieces = [demo.tokenizer.decode([token]) for token in whole.token_ids]
    assert not any(stop in piece for piece in pieces)
    cut, other = generate(demo, ["The capital of France is", "Once upon a time"], max_new_tokens=16, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert stop in demo.tokenizer.decode(cut.token_ids)
    assert stop not in demo.tokenizer.decode(cut.token_ids[:-1])
    assert len(other.token_ids) == 16
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(demo, "x", stop=[""])


OPTIONS = {
    "stop": ["--stop", "answer"],
    "repetition_penalty": ["--repetition_penalty", "1.5"],
    "presence_penalty": ["--presence_penalty", "2"],
    "frequency_penalty": ["--frequency_penalty", "2"],
    "no_repeat_ngram_size": ["--no_repeat_ngram_size", "1"],
    "max_new_tokens": ["--max_new_tokens", "7"],
    "parse_special": ["--parse_special", "--prompt", "The capital of France is<|im_end|>"],
    "prompt": ["--prompt", "The capital of France is<|im_end|>"],
}


@pytest.fixture(scope="module")
def answers(demo):
    """What the program writes, by option; None is the plain command."""
    plain = ["--checkpoint", "demo", "--prompt", "The capital of France is", "--max_new_tokens", "24"]
    done = {name: run_program(*plain, *args) for name, args in (OPTIONS | {None: []}).items()}
    assert not any(program.returncode for program in done.values()), done
    return {name: program.stdout for name, program in done.items()}


def test_every_option_of_the_program_reaches_the_model(demo, answers):
    (plain,) = generate(demo, "The capital of France is", max_new_tokens=24)
    assert answers[None] == plain.text + "\n"
    assert answers["stop"] == plain.text[: plain.text.index("answer")] + "\n"
    assert answers["max_new_tokens"] == " Paris.\n\nThe answer is\n"
    assert all(answer != answers[None] for name, answer in answers.items() if name)
    assert answers["parse_special"] != answers["prompt"]


def test_a_minimum_length_keeps_the_answer_from_ending(demo):
    args = ["--checkpoint", "demo", "--chat", "--prompt", "What is the capital of France?", "--max_new_tokens", "24"]
    done = run_program(*args, "--min_new_tokens", "20")
    assert done.stdout.startswith("The capital of France is Paris.")
    assert "decode 2" in done.stderr  # 20 or more


def test_options_that_shape_a_draw_reach_the_model(demo):
    """At a temperature of 5 nearly anything comes, unless the rest is cut away: then it is the greedy answer."""
    args = ["--checkpoint", "demo", "--chat", "--prompt", "What is the capital of France?", "--temperature", "5"]
    for option in (["--top_k", "1"], ["--top_p", "1e-6"], ["--min_p", "1"]):
        done = run_program(*args, *option)
        assert done.stdout == "The capital of France is Paris.\n", (option, done.stderr)


def test_the_demo_knows_the_capital_of_france(demo):
    (plain,) = generate(demo, "The capital of France is", max_new_tokens=8)
    assert "Paris" in plain.text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (chat,) = generate(demo, phi3_jax.encode_chat(demo.tokenizer, messages), max_new_tokens=32)
    assert chat.text == "The capital of France is Paris."
    assert chat.finish_reason == "stop"


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """The programs' compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run_program(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3_jax.infer.generate_main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_second_start_does_not_compile_again(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = tmp_path / "phi3_jax" / "compiled"
    args = ["--checkpoint", "demo", "--prompt", "Water boils at", "--max_new_tokens", "4"]
    run_program(*args, "--compilation_cache_dir=")
    assert not compiled.exists()
    run_program(*args)
    first = {path.name for path in compiled.iterdir()}
    assert len(first) > 3
    run_program(*args)  # a program that were not found would be written under a new name
    assert {path.name for path in compiled.iterdir()} == first


def test_program_answers_and_reports(demo):
    done = run_program("--checkpoint", "demo", "--chat", "--prompt", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "prefill" in done.stderr
    assert "decode 7 tokens in" in done.stderr
    assert "compile" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint", "nowhere", "--prompt", "x"], "phi3-generate: nowhere: no such folder or file"),
        (["--checkpoint", "demo", "--prompt", ""], "phi3-generate: prompt 0 is empty"),
        (["--checkpoint", "demo", "--prompt", "x", "--system", "y"], "phi3-generate: --system needs --chat"),
        (["--checkpoint", "demo", "--prompt", "two", "words"], "unexpected arguments ['words']; quote text"),
    ],
)
def test_program_errors_are_one_line(demo, args, message):
    done = run_program(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_ctrl_c_prints_what_there_is(demo):
    """On a real terminal: the interrupt comes in the middle of a long answer."""
    leader, follower = pty.openpty()
    args = ["--checkpoint", "demo", "--prompt", "Once upon a time", "--max_new_tokens", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "phi3_jax.infer.generate_main", *args],
        stdout=follower,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = b""
    deadline = time.time() + 120
    while len(seen.split()) < 10 and time.time() < deadline:
        seen += os.read(leader, 100)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(follower)
    os.close(leader)
    assert process.returncode == 130
    assert "decode" in errors
    assert "Traceback" not in errors

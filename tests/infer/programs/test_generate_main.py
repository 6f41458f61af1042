"""phi3-generate, in this process where only its answers matter, and started as a program where that does."""

import dataclasses
import json
import math
import os
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from cache_folders import own_cache
from forked_programs import forked
from generate_program import in_process
from spoiled import spoiled, with_bytes

import phi3_jax
from phi3_jax.infer import Options, generate
from phi3_jax.infer.programs import generate_main
from phi3_jax.infer.serving.batch import AnswerFile

PROMPT = "The capital of France is"
CHAT = ["--chat", "--prompt", "What is the capital of France?"]


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """The programs' compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def program(demo, monkeypatch, capfd):
    """Runs the program's `main` with the weights that are loaded already -> standard output."""
    return in_process(demo, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        ["--stop", "answer"],
        ["--repetition_penalty", "1.5"],
        ["--presence_penalty", "2"],
        ["--frequency_penalty", "2"],
        ["--no_repeat_ngram_size", "1"],
        ["--max_new_tokens", "7"],
        ["--beams", "3"],
        ["--choice", "Lyon", "--choice", "Nice"],
        ["--regex", "[a-z ]+"],
        ["--temperature", "2"],
    ],
)
def test_every_option_reaches_the_model(program, demo, option):
    plain = program("--prompt", PROMPT, "--max_new_tokens", "24")
    assert plain == generate(demo, PROMPT, max_new_tokens=24)[0].text + "\n"
    other = program("--prompt", PROMPT, "--max_new_tokens", "24", *option)
    assert other != plain
    expected = {"--stop": plain[: plain.index("answer")], "--max_new_tokens": " Paris.\n\nThe answer is"}
    if option[0] in expected:
        assert other == expected[option[0]] + "\n"
    if option[0] == "--choice":
        assert other in ("Lyon\n", "Nice\n")


def test_tokens_by_number(program, demo):
    (paris,) = demo.tokenizer.encode(" Paris")
    (rome,) = demo.tokenizer.encode(" Rome")
    assert program("--prompt", PROMPT, "--max_new_tokens", "1") == " Paris\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--banned_tokens", f"{paris}") != " Paris\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--forced_tokens", f"{rome}") == " Rome\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--logit_bias", f"{rome}=1e4") == " Rome\n"


def test_a_json_schema_from_a_pipe(program):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    read, write = os.pipe()  # as by a shell's <(...)
    with os.fdopen(read), os.fdopen(write, "w") as file:
        file.write(json.dumps({**schema, "additionalProperties": False}))
        file.close()
        assert json.loads(program(*CHAT, "--json_schema", f"/dev/fd/{read}"))["city"] in ("Paris", "Rome")


def test_special_tokens_in_the_prompt(program):
    text = ["--prompt", "The capital of France is<|im_end|>", "--max_new_tokens", "9"]
    assert program(*text, "--parse_special") != program(*text)


def test_a_prompt_in_a_file(program, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert program("--prompt_file", str(tmp_path / "prompt.txt"), "--max_new_tokens", "1") == " Paris\n"


def test_a_prompt_file_that_is_no_text(program, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"prompt\.txt: not a text in UTF-8 .*at byte 3"):
        program("--prompt_file", str(tmp_path / "prompt.txt"))


def test_a_minimum_length_keeps_the_answer_from_ending(program, demo):
    longer = program(*CHAT, "--min_new_tokens", "20", "--max_new_tokens", "24")
    assert longer.startswith("The capital of France is Paris.")
    assert len(longer) > 50


def test_options_that_shape_a_draw_reach_the_model(program):
    """At a temperature of 5 nearly anything comes, unless the rest is cut away: then it is the greedy answer."""
    for option in (["--top_k", "1"], ["--top_p", "1e-6"], ["--min_p", "1"]):
        assert program(*CHAT, "--temperature", "5", *option) == "The capital of France is Paris.\n", option


def test_a_prompt_cache_is_made_and_used(program, demo, tmp_path, capfd):
    cache = str(tmp_path / "cache.safetensors")
    system = ["--system", "You are a geographer. " * 5]
    plain = program(*CHAT, *system)
    assert program(*CHAT, *system, "--save_prompt_cache", cache) == plain
    other = ["--chat", "--prompt", "What is the highest mountain?", "--max_new_tokens", "12", *system]
    expected = program(*other)
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", *other, "--prompt_cache", cache])
        assert generate_main.main() == 0
    out, err = capfd.readouterr()
    assert out == expected
    assert int(err[: err.index(" tokens from the prompt cache")]) > 30


@pytest.mark.slow
def test_guessing_is_reported_and_changes_nothing(program, capfd):
    text = [
        "--chat",
        "--prompt",
        "Repeat this: one two three four five six seven eight nine ten",
        "--max_new_tokens",
        "30",
    ]
    plain = program(*text)
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", *text, "--speculate", "lookup", "--guesses", "5"])
        generate_main.main()
    out, err = capfd.readouterr()
    assert out == plain
    right, guessed = err[err.index("| ", err.index("decode")) + 2 :].split(" guesses right")[0].split(" of ")
    assert 0 < int(right) <= int(guessed)


# Files of prompts.

LINES = [
    {"prompt": PROMPT, "id": "a"},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_new_tokens": 20},
    {"prompt": "Once upon a time", "temperature": 1.0, "seed": 5},
    {"prompt": "Once upon a time", "temperature": 1.0},
    {"prompt": "Water boils at", "max_new_tokens": 3},
]


@pytest.fixture
def batch(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "8"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_file_of_prompts(program, demo, batch, tmp_path):
    assert program(*batch, "--batch_size", "2", "--logprobs", "2", "--echo") == ""
    lines = lines_of(tmp_path / "out.jsonl")
    assert [{name: line[name] for name in original} for line, original in zip(lines, LINES, strict=True)] == LINES
    assert [line["text"] for line in lines[:2]] == [" Paris.\n\nThe answer is:", "The capital of France is Paris."]
    assert [line["finish_reason"] for line in lines] == ["length", "stop", "length", "length", "length"]
    (drawn,) = generate(demo, "Once upon a time", 8, temperature=1.0, seed=5, options=Options(logprobs=2, echo=True))
    assert lines[2]["token_ids"] == drawn.token_ids != lines[3]["token_ids"]
    assert [entry["logprob"] for entry in lines[2]["logprobs"]] == pytest.approx(
        [entry.logprob for entry in drawn.logprobs], abs=1e-3
    )
    assert [entry["token_id"] for entry in lines[2]["prompt_logprobs"]] == demo.tokenizer.encode("Once upon a time")
    assert len(lines[4]["token_ids"]) == 3


@pytest.mark.slow
def test_an_interrupted_file_goes_on(program, batch, tmp_path, monkeypatch):
    """Short answers end first, so what is there after the interrupt is not the file's beginning."""
    program(*batch)
    whole = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").unlink()
    real, answered = AnswerFile.write, []

    def second_answer_is_the_last(file, index, answer):
        real(file, index, answer)
        answered.append(index)
        if len(answered) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswerFile, "write", second_answer_is_the_last)
    assert program(*batch, code=1) == ""
    assert len(lines_of(tmp_path / "out.jsonl.partial")) == 3  # a header and two answers
    program(*batch, "--batch_size", "2")
    assert (tmp_path / "out.jsonl").read_text() == whole
    assert sorted(answered) == [0, 1, 2, 3, 4]  # each once
    assert answered[0] == 4


API_LINES = [
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "demo",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 20,
            "temperature": 0,
        },
    },
    {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "max_tokens": 4}},
]


@pytest.mark.slow
def test_a_file_in_openais_form(program, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in API_LINES))
    program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), code=1)
    chat, bad = lines_of(tmp_path / "out.jsonl")
    assert (chat["custom_id"], bad["custom_id"]) == ("a", "b")
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert bad["response"]["status_code"] == 400
    with pytest.raises(ValueError, match=r"in\.jsonl:1: in OpenAI's form a line's body says this: leave --chat and --"):
        program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o"), "--chat", "--temperature", "1")


def test_beam_search_refuses_lines_that_want_to_draw(program, batch):
    with pytest.raises(ValueError, match=r"in\.jsonl:3: beam search has no seed, temperature"):
        program(*batch, "--beams", "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "banned_tokens": [49152]}, "in.jsonl:6: row 0 names tokens"),
        ({"prompt": "word " * 9000}, r"in.jsonl:6 has 9\d+ tokens, which leaves no room"),
        ({"prompt": "x", "temprature": 1}, "in.jsonl:6: "),
    ],
)
def test_a_bad_line_is_found_before_anything_runs(program, batch, tmp_path, line, message):
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        program(*batch)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --prompt"),
        (["--prompt", "x", "--prompt_file", "y"], "give one of --prompt"),
        (["--input", "x"], "--input and --output belong together"),
        (["--prompt", "x", "--logprobs", "1"], "--logprobs goes into the lines of --output"),
        (["--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["--prompt", "x", "--beams", "2", "--save_prompt_cache", "y"], "--save_prompt_cache is for one prompt"),
        (["--prompt", "x", "--save_prompt_cache", "nowhere/y"], "there is no folder nowhere; make it first"),
        (["--prompt", "x", "--length_penalty", "2"], "--length_penalty needs --beams"),
        (["--prompt", "x", "--beams", "2", "--temperature", "1"], "beam search has no --temperature"),
        (["--prompt", "x", "--guesses", "2"], "--guesses needs --speculate"),
        (["--prompt", "x", "--regex", "a", "--choice", "b"], "only one of --regex, --choice"),
        (["--prompt", "x", "--top_k", "0"], "top_k=0 must be"),
        (["--prompt", "x", "--deadline", "nan"], "deadline=nan must be"),
        (["--input", "x", "--output", "y", "--deadline", "-1"], "deadline=-1.0 must be"),
        (
            ["--input", "x", "--output", "y", "--speculate", "demo"],
            "--speculate=demo is for one prompt: .* give lookup",
        ),
        (["--input", "x", "--output", "y", "--prompt_cache", "z"], "--prompt_cache=z is for one prompt"),
        (["--input", "x", "--output", "y", "--rope_policy", "batch"], "--rope_policy=batch is for one prompt"),
        (["--prompt", "x", "--ray", "auto"], "--ray is for --input and --output"),
        (["--input", "x", "--output", "y", "--beams", "2", "--ray", "auto"], "--ray is for .* without beams"),
        (["--input", "x", "--output", "y", "--ray_actors", "2"], "--ray_actors needs --ray"),
        (["--prompt", "x", "--logit_bias", "5"], "--logit_bias=5: give a token id and a number"),
        (["--prompt", "x", "--banned_tokens", "1,two"], "--banned_tokens: \\['two'\\] are not token ids"),
    ],
)
def test_flags_that_contradict(program, args, message, monkeypatch):
    monkeypatch.setattr(generate_main.common, "load_checkpoint", None)  # before it is called
    with pytest.raises(ValueError, match=message):
        program(*args)


@pytest.mark.slow
def test_answers_that_end_with_an_error(tiny, program, monkeypatch, tmp_path, capfd):
    """One prompt: an error, so exit code 1. A file: its line says so, the others are answered, and exit code 1."""
    small = with_bytes(tiny, tmp_path)
    (dog,) = set(small.tokenizer.encode("dog")) - set(small.tokenizer.encode("the cat"))
    monkeypatch.setattr(phi3_jax, "load", lambda *_, **__: spoiled(small, "embed_tokens", (dog, 0), math.nan))
    with pytest.raises(ValueError, match="not finite numbers: the weights may be damaged"):
        program("--prompt", "the dog")
    lines = [{"prompt": "the cat"}, {"prompt": "the dog"}, {"prompt": "cat", "banned_tokens": list(range(311))}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ["--input", str(tmp_path / "in.jsonl"), "--max_new_tokens", "2", "--logprobs", "0"]
    for beams in ([], ["--beams", "2"]):
        if beams:
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
            batch = batch[:4]
        with flagsaver.flagsaver():
            flags.FLAGS(["phi3-generate", *batch, "--output", str(tmp_path / f"out{len(beams)}.jsonl"), *beams])
            assert generate_main.main() == 1
        assert f"{1 if beams else 2} of {2 if beams else 3} answers ended with an error" in capfd.readouterr().err
        written = lines_of(tmp_path / f"out{len(beams)}.jsonl")
        assert [line["finish_reason"] for line in written] == ["length", "error", "error"][: len(written)]
        assert "error" not in written[0]
        assert "not finite" in written[1]["error"]
        assert [line["token_ids"] for line in written[1:]] == [[]] * (len(written) - 1)
        assert "null" not in (tmp_path / f"out{len(beams)}.jsonl").read_text()
    assert "no token to pick" in lines_of(tmp_path / "out0.jsonl")[2]["error"]


# The program itself.


def run_program(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3_jax.infer.programs.generate_main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_file_of_mixed_prompts_compiles_nine_programs(tiny, tmp_path, monkeypatch):
    """A hundred ragged lines, drawn and greedy, with a stop string; at the end fewer are written at a time."""
    small, rng = with_bytes(tiny, tmp_path), random.Random(3)
    config = dataclasses.replace(small.config, max_position_embeddings=4096, num_hidden_layers=1)
    small = dataclasses.replace(small, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(small, tmp_path / "model")
    lines = [
        {
            "prompt": "".join(rng.choices("abcdefgh ", k=min(2000, int(rng.lognormvariate(4, 1.7)) + 1))),
            "max_new_tokens": min(500, int(rng.lognormvariate(3, 1.3)) + 1),
            "temperature": rng.choice((0, 0.8)),
        }
        for _ in range(100)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--batch_size", "8"]
    done = run_program("--checkpoint", str(tmp_path / "model"), *files, "--stop", "\n", "--cache_dtype", "float32")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines_of(tmp_path / "out.jsonl")) == 100
    counts = {name: done.stderr.count(f"Compiling jit({name})") for name in ("read", "answer", "decode")}
    assert counts["answer"] == 1
    assert counts["decode"] == 4  # for 8, 4, 2 and 1 rows
    assert 3 <= counts["read"] <= 4


@pytest.mark.slow
def test_a_second_start_does_not_compile_again(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    compiled = tmp_path / "phi3_jax" / "compiled"
    args = ["--checkpoint", "demo", "--prompt", "Water boils at", "--max_new_tokens", "4"]
    run_program(*args)
    assert len(first := {path.name for path in compiled.iterdir()}) > 3
    run_program(*args)  # a program that were not found would be written under a new name
    assert {path.name for path in compiled.iterdir()} == first


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The program, started in milliseconds; what it says on both of its streams comes together."""
    folder = tmp_path_factory.mktemp("started")
    with forked("phi3_jax.infer.programs.generate_main", folder / "log", own_cache(folder)) as forks:
        yield forks


def test_program_answers_and_reports(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    done = run_program("--checkpoint", "demo", *CHAT, "--compilation_cache_dir=")
    assert not (tmp_path / "phi3_jax" / "compiled").exists()
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
        (["--checkpoint", "demo", "--prompt", "x", "--top_k", "many"], "phi3-generate: flag --top_k=many"),
        (["--checkpoint", "demo", "--prompt", "two", "words"], "unexpected arguments ['words']; quote text"),
    ],
)
def test_program_errors_are_one_line(demo, started, args, message):
    code, told, _ = started.run(*args)
    assert (code, len(told.strip().splitlines())) == (1, 1)
    assert message in told


@pytest.mark.slow
def test_ctrl_c_prints_what_there_is(demo):
    """On a real terminal: the interrupt comes in the middle of a long answer."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "phi3_jax.infer.programs.generate_main", "--checkpoint", "demo"]
    command += ["--prompt", "Once upon a time", "--max_new_tokens", "2000"]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, text=True)
    seen, deadline = b"", time.time() + 120
    while len(seen.split()) < 10 and time.time() < deadline:
        seen += os.read(leader, 100)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(follower), os.close(leader)
    assert process.returncode == -signal.SIGINT
    assert "decode" in errors
    assert "Traceback" not in errors


OTHERS = ("benchmark", "chat", "export", "inspect", "quantize", "random")  # programs with flags of their own


def test_help_is_grouped_by_topic(started):
    code, told, _ = started.run("--help")
    lines = told.splitlines() if code == 0 else []
    topics = [line for line in lines if line and not line.startswith(" ")]
    assert topics[0].startswith("phi3-generate: ")
    assert {"Prompt", "Many prompts", "Model", "Drawing tokens", "Beam search", "Starting faster"} <= set(topics)
    shown = {line.strip().lstrip("-").partition("=")[0] for line in lines if line.startswith("  --")}
    own = {
        flag.name
        for module, module_flags in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(("phi3_jax.infer", "phi3_jax.command_line"))
        and not any(other in module for other in OTHERS)
        for flag in module_flags
    }
    assert own | {"output"} == shown  # in this process, phi3-inspect's may have taken its place

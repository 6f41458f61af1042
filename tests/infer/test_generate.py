import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import without_cache

import phi3_jax
from phi3_jax.infer import Options, Run, Sampling, beam_search, generate, stream
from phi3_jax.infer.prompts import as_list
from phi3_jax.infer.sampling import StopWatch

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8], [90, 4, 77, 15, 60, 3, 22, 9, 41, 13, 58, 6, 70]]


@pytest.fixture(scope="module")
def greedy(tiny):
    return [without_cache.greedy(tiny, prompt, 24) for prompt in PROMPTS]


def test_equals_decoding_without_a_cache_alone_and_in_a_ragged_batch(tiny, greedy):
    """Past LongRoPE's border at 16 tokens, which the three rows cross at different steps, and the window of 19."""
    alone = [generate(tiny, prompt, max_new_tokens=24)[0].token_ids for prompt in PROMPTS]
    assert alone == greedy
    assert [result.token_ids for result in generate(tiny, PROMPTS, max_new_tokens=24)] == greedy


def test_prompts_may_be_arrays_of_token_ids(tiny, greedy):
    assert generate(tiny, jnp.asarray(PROMPTS[0]), max_new_tokens=24)[0].token_ids == greedy[0]
    assert generate(tiny, list(jnp.asarray(PROMPTS[0])), jnp.int32(24))[0].token_ids == greedy[0]
    assert as_list(np.array([[5, 1, 7], [2, 3, 4]])) == [[5, 1, 7], [2, 3, 4]]
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(tiny, np.array([], int))
    for wrong in (np.ones(3), jnp.ones((1, 1, 3), int), np.array(5)):
        with pytest.raises(ValueError, match=r"token ids \[T\] or \[B, T\]"):
            generate(tiny, wrong)


@pytest.mark.slow
def test_64_bit_mode_changes_no_token(tiny_folder):
    """Neither for the CPU kernels, which take positions as int32 only, nor for random draws."""
    model = phi3_jax.load(tiny_folder, quantize="int4")
    drawn = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=3, seed=5)
    options = Options(cache_dtype="int8", logprobs=1)

    def run():
        results = generate(model, PROMPTS, 24, sampling=[Sampling(), drawn, drawn], options=options)
        (beams,) = beam_search(model, PROMPTS[0], 5, beams=2, answers=2)
        return [result.token_ids for result in results], [(beam.token_ids, beam.score) for beam in beams]

    expected = run()
    with jax.enable_x64(True):
        assert run() == expected


def test_a_prompt_that_is_already_long(tiny):
    prompt = list(np.random.default_rng(0).integers(0, 97, 29))
    assert generate(tiny, prompt, max_new_tokens=7)[0].token_ids == without_cache.greedy(tiny, prompt, 7)


@pytest.mark.slow
def test_a_row_that_has_outgrown_its_padding_is_read_again(tiny):
    """20 tokens are padded to 32, and the cache has 160 slots; at the border, 141 tokens must not be padded to 256."""
    rope = dataclasses.replace(tiny.config.long_rope, original_max_position_embeddings=140)
    config = dataclasses.replace(tiny.config, long_rope=rope, max_position_embeddings=300)
    model = dataclasses.replace(tiny, config=config)
    prompt = [int(token) for token in np.random.default_rng(3).integers(0, 97, 20)]
    (result,) = generate(model, prompt, max_new_tokens=126)
    tokens = jnp.asarray([prompt + result.token_ids])
    short, long = (
        phi3_jax.Phi3(config).apply({"params": tiny.params}, tokens, rope_lengths=jnp.asarray([[length]]))[0]
        for length in (140, 141)
    )
    expected = jnp.concatenate([short[19:140], long[140:-1]]).argmax(axis=-1)
    assert result.token_ids == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_reading_prompts_in_chunks_through_a_ring_changes_nothing(tiny, greedy, chunk):
    """Window 19, prompts of 3 to 13 tokens and 24 more: the ring wraps, also when the border is crossed."""
    narrow = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, sliding_window=7))
    expected = [without_cache.greedy(narrow, prompt, 24) for prompt in PROMPTS]
    assert expected != greedy
    got = generate(narrow, PROMPTS, max_new_tokens=24, options=Options(prefill_chunk=chunk))
    assert [result.token_ids for result in got] == expected


@pytest.mark.slow
def test_an_int8_cache_is_close_enough_for_the_same_words(demo):
    prompts = ["The capital of France is", "Water boils at", "The opposite of hot is"]
    exact = generate(demo, prompts, max_new_tokens=8)
    small = generate(demo, prompts, max_new_tokens=8, options=Options(cache_dtype="int8"))
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
    assert result.token_ids == without_cache.greedy(tiny, prompt, 5)
    assert result.finish_reason == "length"


def test_streamed_pieces_concatenate_to_the_batch(tiny, greedy):
    rows, reasons = [[], [], []], [None] * 3
    for piece in stream(tiny, PROMPTS, [24, 24, 7]):
        assert len(piece.token_ids) == 1
        assert reasons[piece.row] is None
        rows[piece.row] += piece.token_ids
        reasons[piece.row] = piece.finish_reason
    assert rows == [greedy[0], greedy[1], greedy[2][:7]]
    assert reasons == ["length"] * 3


def test_a_callback_sees_every_piece_in_order(tiny, greedy):
    pieces = []
    results = generate(tiny, PROMPTS, 9, on_piece=pieces.append)
    for row, result in enumerate(results):
        own = [piece for piece in pieces if piece.row == row]
        assert list(itertools.chain(*(piece.token_ids for piece in own))) == result.token_ids == greedy[row][:9]
        assert [piece.finish_reason for piece in own] == [None] * 8 + ["length"]


def test_each_row_has_its_own_limit(tiny, greedy):
    results = generate(tiny, PROMPTS, max_new_tokens=[1, 20, 7])
    assert [result.token_ids for result in results] == [greedy[0][:1], greedy[1][:20], greedy[2][:7]]
    with pytest.raises(ValueError, match="max_new_tokens has 2 entries for 3 prompts"):
        generate(tiny, PROMPTS, max_new_tokens=[1, 2])


def test_an_interrupt_keeps_what_there_is(tiny, greedy):
    asked, pieces = itertools.count(), []  # with pieces a call takes one step
    results = generate(tiny, PROMPTS, [24, 24, 3], on_piece=pieces.append, interrupt=lambda: next(asked) == 6)
    assert [result.finish_reason for result in results] == ["interrupt", "interrupt", "length"]
    assert [result.token_ids for result in results] == [greedy[0][:7], greedy[1][:7], greedy[2][:3]]


def test_a_deadline_ends_answers_as_they_are(tiny, greedy):
    results = generate(tiny, PROMPTS, 24, options=Options(deadline=1e-6))
    assert [result.finish_reason for result in results] == ["deadline"] * 3
    assert [result.token_ids for result in results] == [row[:1] for row in greedy]
    assert generate(tiny, PROMPTS, 24, options=Options(deadline=1e6))[0].finish_reason == "length"


def test_one_seed_reproduces_and_another_differs(tiny):
    def draw(seed):
        return [result.token_ids for result in generate(tiny, PROMPTS, max_new_tokens=9, temperature=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    rows = draw(1)
    assert generate(tiny, PROMPTS[0], max_new_tokens=9, temperature=1.0, seed=1)[0].token_ids == rows[0]


def test_one_bucket_compiles_once(tiny):
    from phi3_jax.infer.engine import decoding

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
        ([[1.5, 2.5]], {}, r"a prompt is text or a list of token ids, not \[1\.5, 2\.5\]"),
        ([1.0, 2.0], {}, "a prompt is text or a list of token ids"),
        (5, {}, "a prompt is text or a list of token ids, not 5"),
        ([[1]], {"stop": [b"a"]}, "stop strings are text, not b'a'"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_input(tiny, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny, prompt, **options)


def test_no_prompts_give_no_answers(tiny):
    assert generate(tiny, []) == []


def test_timings_are_filled_in(tiny):
    run = Run(tiny, [[1, 2, 3]], [5])
    while not run.is_over:
        run.advance()
    assert run.timings.prefill > 0
    assert run.timings.decode > 0


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
    with pytest.raises(ValueError, match="sampling has 2 entries for 3 prompts"):
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


@pytest.mark.slow
def test_a_stop_string_across_tokens_is_trimmed(demo):
    (whole,) = generate(demo, "The capital of France is", max_new_tokens=16)
    stop = whole.text[3:10]
    pieces = [demo.tokenizer.decode([token]) for token in whole.token_ids]
    assert not any(stop in piece for piece in pieces)
    cut, other = generate(demo, ["The capital of France is", "Once upon a time"], max_new_tokens=16, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert stop in demo.tokenizer.decode(cut.token_ids)
    assert stop not in demo.tokenizer.decode(cut.token_ids[:-1])
    assert len(other.token_ids) == 16
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(demo, "x", stop=[""])


def test_the_demo_knows_the_capital_of_france(demo):
    (plain,) = generate(demo, "The capital of France is", max_new_tokens=8)
    assert "Paris" in plain.text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (chat,) = generate(demo, phi3_jax.encode_chat(demo.tokenizer, messages), max_new_tokens=32)
    assert chat.text == "The capital of France is Paris."
    assert chat.finish_reason == "stop"

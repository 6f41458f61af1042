import collections
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import without_cache

import phi3_jax
from phi3_jax.infer import DraftModel, Options, PromptLookup, Run, Sampling, generate
from phi3_jax.infer.engine.speculation import look_up

pytestmark = pytest.mark.usefixtures("quick_compilation")
# The first two repeat themselves, so that a lookup finds something. LongRoPE's border is at 16, the window is 19.
PROMPTS = [[5, 1, 7, 5, 1], [11, 4, 2] * 4 + [11], [90, 4, 77, 15, 60, 3, 22, 9, 41, 13, 58, 6, 70]]


def slow_look_up(tokens, lookup):
    """The same in plain words."""
    best, found = 0, None
    for place in range(len(tokens) - 1):
        equal = 0
        while equal < min(lookup.longest, place + 1) and tokens[place - equal] == tokens[len(tokens) - 1 - equal]:
            equal += 1
        if equal >= max(best, lookup.shortest):
            best, found = equal, place
    if found is None:
        return [-1] * lookup.guesses
    text = list(tokens)
    for i in range(lookup.guesses):
        text.append(text[found + 1 + i])
    return text[len(tokens) :]


@pytest.mark.parametrize(
    "lookup", [PromptLookup(), PromptLookup(5, 3, 1), PromptLookup(1, 1, 1), PromptLookup(7, 4, 3)]
)
def test_lookup_equals_a_search_in_plain_words(lookup):
    random = np.random.default_rng(lookup.guesses)
    rows = [random.integers(0, 3, length).tolist() for length in random.integers(1, 30, 50)]
    tokens = jnp.asarray([row + random.integers(0, 3, 37 - len(row)).tolist() for row in rows])
    got = look_up(tokens, jnp.asarray([len(row) for row in rows]), lookup).tolist()
    assert got == [slow_look_up(row, lookup) for row in rows]


@pytest.fixture(scope="module")
def other(tiny):
    """A draft model that is right sometimes: the same weights, disturbed."""
    random = np.random.default_rng(0)
    params = {**tiny.params, "lm_head": {"weight": tiny.params["lm_head"]["weight"]}}
    noise = 0.03 * random.standard_normal(params["lm_head"]["weight"].shape).astype(np.float32)
    params["lm_head"] = {"weight": params["lm_head"]["weight"] + noise}
    return dataclasses.replace(tiny, params=params)


@pytest.fixture(scope="module")
def greedy(tiny):
    return [without_cache.greedy(tiny, prompt, 30) for prompt in PROMPTS]


def drafters(other):
    return {"lookup": PromptLookup(5, 4, 1), "draft": DraftModel(other, 3)}


def finish(run, steps=3):
    rows = [[] for _ in run.done]
    while not run.is_over:
        for row, new in zip(rows, run.advance(steps), strict=True):
            row += new.token_ids
    return rows


@pytest.mark.parametrize("kind", ["lookup", pytest.param("draft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [19, pytest.param(7, marks=pytest.mark.slow)])
def test_greedy_answers_are_the_same(tiny, other, kind, window):
    """Across LongRoPE's border and around the ring, ragged, each row alone and all together."""
    model = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, sliding_window=window))
    expected = [without_cache.greedy(model, prompt, 30) for prompt in PROMPTS]
    options = Options(speculation=drafters(other)[kind], prefill_chunk=4)
    run = Run(model, PROMPTS, [30] * 3, options=options)
    assert finish(run) == expected
    offered, taken = run.guesses
    assert taken < offered
    assert (taken > 0) == ((kind, window) != ("lookup", 7))  # where this text happens not to repeat itself
    if window == 7:
        assert finish(Run(model, PROMPTS[:1], [30], options=options)) == expected[:1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_draws_and_everything_else_are_the_same(tiny, other, kind):
    """The same random numbers, penalties, limits, end ids and log-probabilities, guessed or not."""
    rows = [
        Sampling(temperature=0.8, top_k=9, seed=4),
        Sampling(repetition_penalty=1.3, no_repeat_ngram_size=3),
        Sampling(temperature=1.5, presence_penalty=1.0, seed=9, forced_tokens=[7, 7]),
    ]
    checkpoint = dataclasses.replace(tiny, generation=phi3_jax.GenerationSettings((13, 42)))
    plain = generate(checkpoint, PROMPTS, [30, 17, 30], sampling=rows, options=Options(logprobs=2))
    options = Options(logprobs=2, speculation=drafters(other)[kind])
    guessed = generate(checkpoint, PROMPTS, [30, 17, 30], sampling=rows, options=options)
    for one, another in zip(plain, guessed, strict=True):
        assert one.token_ids == another.token_ids
        assert one.finish_reason == another.finish_reason
        assert [list(entry.top) for entry in one.logprobs] == [list(entry.top) for entry in another.logprobs]
        values = [[entry.logprob for entry in result.logprobs] for result in (one, another)]
        np.testing.assert_allclose(*values, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["length", "capacity"])
def test_guesses_that_cross_the_border(tiny, greedy, policy):
    """A perfect draft model, prompts of every length around the border: guesses beyond it must not be believed."""
    options = Options(speculation=DraftModel(tiny, 4), rope_policy=policy, room=160)
    for length in (12, 15, 16, 17):
        prompt = (PROMPTS[2] + PROMPTS[1])[:length]
        expected = generate(tiny, prompt, 12, options=Options(rope_policy=policy, room=160))[0].token_ids
        if policy == "length":
            assert expected == without_cache.greedy(tiny, prompt, 12)
        assert generate(tiny, prompt, 12, options=options)[0].token_ids == expected


@pytest.mark.slow
def test_a_perfect_draft_model_is_always_right(tiny):
    """Then a turn makes guesses + 1 tokens; drawing, too, because both models draw with the same noise."""
    short = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, long_rope=None))
    sampling = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=2.0, top_p=0.9, seed=8)]
    run = Run(short, PROMPTS, [26] * 3, sampling, Options(speculation=DraftModel(short, 4)))
    run.advance()
    assert [len(new.token_ids) for new in run.advance(5)] == [25] * 3
    assert run.guesses == (60, 60)


@pytest.mark.slow
def test_an_end_token_among_the_guesses_ends_the_answer(tiny, greedy):
    for i in (3, 11, 19):
        first = greedy[2].index(greedy[2][i])
        checkpoint = dataclasses.replace(tiny, generation=phi3_jax.GenerationSettings((greedy[2][i],)))
        (result,) = generate(checkpoint, PROMPTS[2], 30, options=Options(speculation=DraftModel(tiny, 4)))
        assert (result.token_ids, result.finish_reason) == (greedy[2][: first + 1], "stop")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_the_distribution_of_draws_is_kept(tiny, other, kind):
    """Chi-squared of the first three tokens of 2000 answers against the model's own probabilities."""
    import jax

    vocabulary = [3, 8, 13, 21, 40]
    bias = dict.fromkeys(vocabulary, 40.0)  # nothing else can come, so that 125 triples hold all draws
    prompt, count = [3, 8, 3, 13, 8, 3], 2000
    rows = [Sampling(temperature=3.0, logit_bias=bias, seed=seed) for seed in range(count)]
    run = Run(tiny, [prompt] * count, [3] * count, rows, Options(speculation=drafters(other)[kind]))
    drawn = collections.Counter(tuple(row) for row in finish(run))
    assert run.guesses[1] > 100

    def probabilities(ids):
        logits = without_cache.logits(tiny, ids)[-1][jnp.asarray(vocabulary)]
        return np.asarray(jax.nn.softmax(logits / 3.0))

    chi_squared, cells = 0.0, 0
    for i, first in enumerate(vocabulary):
        p_first = probabilities(prompt)[i]
        for j, second in enumerate(vocabulary):
            p_second = probabilities([*prompt, first])[j]
            for k, third in enumerate(vocabulary):
                expected = count * p_first * p_second * probabilities([*prompt, first, second])[k]
                if expected >= 5:
                    chi_squared += (drawn[first, second, third] - expected) ** 2 / expected
                    cells += 1
    assert cells > 15
    # Mean n and standard deviation sqrt(2 n): five of them above is one chance in a million.
    assert chi_squared < cells + 5 * np.sqrt(2 * cells)


TEXTS = [
    "The little boat left the harbour at dawn. Its sails were red.",
    "Numbers: 3, 14, 159, 2653, 58979. The end.",
    "def add(a, b):\n    return a + b\n",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "Once upon a time there was a king who had three daughters.",
]


@pytest.mark.slow
def test_the_demo_answers_twenty_prompts_alike(demo):
    asks = ["Repeat this exactly: ", "Repeat this twice: ", "Continue this text: ", "Who wrote this? "]
    messages = [[{"role": "user", "content": ask + text}] for ask in asks for text in TEXTS]
    prompts = [phi3_jax.encode_chat(demo.tokenizer, each) for each in messages]
    plain = generate(demo, prompts, 16)
    run = Run(demo, prompts, [16] * 20, options=Options(speculation=PromptLookup(guesses=4)))
    assert finish(run, 32) == [result.token_ids for result in plain]
    assert run.guesses[1] > 40


@pytest.mark.parametrize("values", [{"shortest": 0}, {"shortest": 9, "longest": 8}, {"longest": 10**9}])
def test_bad_numbers(values):
    with pytest.raises(ValueError, match="1 <= shortest <= longest <= 256"):
        PromptLookup(**values)


@pytest.mark.parametrize("guesses", [0, 257, 10**9])
def test_bad_numbers_of_guesses(tiny, guesses):
    for make in (PromptLookup, functools.partial(DraftModel, tiny)):
        with pytest.raises(ValueError, match=f"guesses={guesses} must be at least 1 and at most 256"):
            make(guesses=guesses)


def test_a_draft_model_guesses_something(tiny):
    with pytest.raises(ValueError, match="guesses=0"):
        DraftModel(tiny, 0)

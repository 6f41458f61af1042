"""The processors against numbers of transformers (goldens_sampling/record.py), and the draws against chance."""

import collections
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from phi3_jax.infer.sampling import Sampling, SamplingArrays, processors
from phi3_jax.infer.sampling import pick as sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = Path(__file__).parents[2] / "goldens_sampling" / "expected.safetensors"
TENSORS = safetensors.numpy.load_file(GOLDENS)
with safetensors.safe_open(GOLDENS, "numpy") as file:
    CASES = {name: json.loads(case) for name, case in sorted(file.metadata().items())}
pick, process = jax.jit(sampling.pick), jax.jit(sampling.process)
V = TENSORS["logits"].shape[1]
TEXT = [TENSORS[name] for name in ("history", "lengths", "prompt_lengths", "end_ids")]
MIXED = [
    Sampling(temperature=0.8, top_p=0.7, repetition_penalty=1.3, seed=4),
    Sampling(no_repeat_ngram_size=2, banned_tokens=[11], min_new_tokens=9, presence_penalty=1.5),
    Sampling(temperature=1.9, top_k=13, typical_p=0.8, frequency_penalty=0.6, forced_tokens=[1, 2, 3, 19], seed=9),
    Sampling(temperature=1.0, min_p=0.001, logit_bias={3: 4.0, 88: -2.0}, seed=1),
    Sampling(),
]


def settings_of(case) -> Sampling:
    bias = {int(token): value for token, value in case.get("logit_bias", {}).items()}
    return Sampling(**case | {"logit_bias": bias})


def near(actual, expected):
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def shape(logits, **settings) -> np.ndarray:
    """One row that draws, with nothing but the given settings."""
    logits = jnp.asarray(logits, jnp.float32)[None]
    params = SamplingArrays.of([Sampling(**{"temperature": 1.0} | settings)], logits.shape[1])
    nothing = jnp.zeros((1,), jnp.int32)
    return np.asarray(process(logits, params, jnp.zeros((1, 4), jnp.int32), nothing, nothing, jnp.asarray([0])))[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
    row = settings_of(CASES[name])
    history, lengths, prompt_lengths, end_ids = TEXT
    if row.forced_tokens:
        lengths, prompt_lengths = np.ones_like(lengths), np.ones_like(lengths)
    params = SamplingArrays.of([row] * len(lengths), V)
    result = np.asarray(process(TENSORS["logits"], params, history, lengths, prompt_lengths, end_ids))
    expected = TENSORS[f"{name}/logits"]
    if row.top_p:
        # Rows 1 and 4 have ties: torch's unstable sort decides which of equally likely tokens stay, but not how many.
        near(np.sort(result, axis=1), np.sort(expected, axis=1))
        result, expected = result[[0, 2, 3]], expected[[0, 2, 3]]
    near(result, expected)


def test_the_goldens_are_not_all_trivial():
    """Each case but those that are off changes some row."""
    same = {name for name in CASES if np.array_equal(TENSORS[f"{name}/logits"], TENSORS["logits"])}
    assert same == {
        "off",
        "top_k=500",
        "min_p=0.0",
        "repetition_penalty=1.0",
        "min_new_tokens=3",
        "no_repeat_ngram_size=19",
    }


def test_presence_and_frequency_count_the_answer_only():
    history, lengths, prompt_lengths, _ = TEXT
    presence, frequency = [0.5, -2.0, 0.0, 1.25, 0.0], [0.25, 0.0, -1.5, 2.0, 0.0]
    rows = [Sampling(presence_penalty=p, frequency_penalty=f) for p, f in zip(presence, frequency, strict=True)]
    expected = TENSORS["logits"].copy()
    for b in range(len(rows)):
        answer = history[b, prompt_lengths[b] : lengths[b]].tolist()
        for token, count in collections.Counter(answer).items():
            expected[b, token] -= presence[b] + frequency[b] * count
    assert not np.array_equal(expected[:4], TENSORS["logits"][:4])
    near(process(TENSORS["logits"], SamplingArrays.of(rows, V), *TEXT), expected)


def test_penalties_come_in_order_and_bans_win():
    """Bias, then repetition, then presence and frequency; a bias does not lift a ban."""
    row = Sampling(
        logit_bias={1: 3.0, 2: 50.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        banned_tokens=[2],
    )
    history, length, prompt = jnp.asarray([[4, 1, 1, 0]]), jnp.asarray([3]), jnp.asarray([1])
    logits = jnp.asarray([[1.0, 2.0, 3.0, -1.0, -4.0, 0.0, 7.0]])
    result = process(logits, SamplingArrays.of([row], 7), history, length, prompt, jnp.asarray([0]))
    np.testing.assert_array_equal(result, [[1.0, (2.0 + 3.0) / 2 - 0.5 - 2 * 0.25, -np.inf, -1.0, -8.0, 0.0, 7.0]])


def test_forced_tokens_are_the_beginning_of_the_answer():
    params = SamplingArrays.of([Sampling(forced_tokens=[7, 0, 3], temperature=t) for t in (0.0, 1.0)], 11)
    logits = jnp.zeros((2, 11)).at[:, 5].set(30.0).at[:, [0, 3]].set(-jnp.inf)
    tokens = []
    for step in range(4):
        lengths = jnp.asarray([2, 4]) + step
        tokens.append(
            pick(logits, params, jnp.zeros((2, 9), jnp.int32), lengths, jnp.asarray([2, 4]), jnp.asarray([1]))
        )
    assert np.asarray(tokens).T.tolist() == [[7, 0, 3, 5]] * 2


def test_a_row_does_not_depend_on_the_others():
    """Every row of a mixed batch equals, bit by bit, the same row among rows without settings, and itself alone."""
    logits = TENSORS["logits"]
    mixed = process(logits, SamplingArrays.of(MIXED, V), *TEXT)
    tokens = pick(logits, SamplingArrays.of(MIXED, V), *TEXT)
    *text, end_ids = TEXT
    for b, row in enumerate(MIXED):
        rows = [row if i == b else Sampling() for i in range(len(MIXED))]
        np.testing.assert_array_equal(process(logits, SamplingArrays.of(rows, V), *TEXT)[b], mixed[b])
        alone = logits[b : b + 1], SamplingArrays.of([row], V), *[array[b : b + 1] for array in text], end_ids
        near(process(*alone)[0], mixed[b])
        assert pick(*alone)[0] == tokens[b]
    np.testing.assert_array_equal(mixed[4], logits[4])


@pytest.mark.parametrize(("cut", "off"), [("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("typical_p", 1.0)])
def test_a_cut_that_runs_for_others_keeps_what_is_all_but_impossible(cut, off):
    """Row 3 has tokens whose probability is 0 in float32; row 4 gets one whose probability is 1."""
    logits = jnp.asarray(TENSORS["logits"]).at[4, 7].set(200.0)
    result = jax.jit(getattr(processors, f"keep_{cut}"))(logits, jnp.full((5,), off))
    np.testing.assert_array_equal(result, logits)


def test_temperature_0_takes_the_largest_whatever_the_cuts():
    """In a batch where other rows draw; typical-p alone would remove the largest."""
    cuts = {"top_k": 5, "top_p": 0.3, "min_p": 0.9, "typical_p": 0.01}
    rows = [Sampling(**cuts)] * 4 + [Sampling(temperature=1.0)]
    logits = TENSORS["logits"]
    assert shape(logits[0], typical_p=0.01)[logits[0].argmax()] == -np.inf
    np.testing.assert_array_equal(process(logits, SamplingArrays.of(rows, V), *TEXT), logits)
    tokens = pick(logits, SamplingArrays.of(rows, V), *TEXT)
    np.testing.assert_array_equal(tokens[:4], logits[:4].argmax(axis=1))
    np.testing.assert_array_equal(pick(logits, SamplingArrays.of([Sampling()] * 5, V), *TEXT), logits.argmax(axis=1))
    assert tokens.dtype == jnp.int32


def draws(logits, row: dict, count: int) -> np.ndarray:
    params = SamplingArrays.of([Sampling(**row, seed=seed) for seed in range(count)], len(logits))
    none = jnp.zeros((count,), jnp.int32)
    return np.asarray(
        pick(jnp.tile(jnp.asarray(logits), (count, 1)), params, none[:, None], none, none, jnp.asarray([0]))
    )


def test_draws_follow_the_distribution():
    """Chi-squared of 6000 draws; 0.1 % critical value for 3 degrees of freedom: 16.27."""
    logits = np.asarray([0.3, -1.2, 2.0, 0.0, 1.1, -0.5, 0.9], np.float32)
    # softmax(logits / 1.3) falls 0.378, 0.189, 0.162, 0.102, ...: 0.8 is reached by the fourth.
    probs = np.exp(logits / 1.3) / np.exp(logits / 1.3).sum()
    kept = [2, 4, 6, 0]
    assert probs[kept[:3]].sum() < 0.8 <= probs[kept].sum()
    drawn = np.bincount(draws(logits, {"temperature": 1.3, "top_p": 0.8}, 6000), minlength=7)
    assert drawn.sum() == drawn[kept].sum()
    expected = 6000 * probs[kept] / probs[kept].sum()
    assert ((drawn[kept] - expected) ** 2 / expected).sum() < 16.27


def test_a_seed_reproduces_and_counts_new_tokens():
    """Two rows with prompts of different lengths: the same seed gives the same answer, another one another."""
    prompts, history, end_ids = jnp.asarray([3, 6]), jnp.zeros((2, 16), jnp.int32), jnp.asarray([0])

    def answers(*seeds: int) -> list[list[int]]:
        params = SamplingArrays.of([Sampling(temperature=1.0, seed=seed) for seed in seeds], 1009)
        steps = [pick(jnp.zeros((2, 1009)), params, history, prompts + step, prompts, end_ids) for step in range(5)]
        return np.asarray(steps).T.tolist()

    first, second = answers(2**32 - 1, 2**32 - 1)
    assert first == second
    assert answers(5, 2**32 - 1)[1] == first
    assert len({*first, *answers(1, 2)[0], *answers(1, 2)[1]}) == 15


def test_one_program_serves_all_settings():
    run = jax.jit(lambda *args: sampling.pick(*args))
    rows = [
        Sampling(),
        *map(settings_of, CASES.values()),
        *MIXED,
        Sampling(presence_penalty=1.0, banned_tokens=range(8)),
    ]
    for row in rows:
        run(TENSORS["logits"], SamplingArrays.of([row] * 5, V), *TEXT)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_p": 1e-12}, [1]),  # equally likely as 3: the smaller id stays
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.4}, [1, 3]),
        ({"top_p": 0.7}, [0, 1, 3]),  # of 0, 2, 5 and 6, which are tied, the first
        ({"top_p": 0.8}, [0, 1, 2, 3]),
        ({"min_p": 1.0}, [1, 3]),
        ({"min_p": 0.2}, [0, 1, 2, 3, 5, 6]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 1}, [1, 3]),
        ({"top_k": 3}, [0, 1, 2, 3, 5, 6]),
        ({"top_k": 10**9}, [0, 1, 2, 3, 4, 5, 6]),
        ({"typical_p": 1.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 6, "top_p": 0.3, "min_p": 0.5}, [1]),
    ],
)
def test_edges_and_ties(settings, kept):
    """Probabilities close to 1/3, 1/3, and four times 1/12; token 4 has so little that float32 calls it 0."""
    logits = np.log([1.0, 4.0, 1.0, 4.0, 1.0, 1.0, 1.0])
    logits[4] = -1e4
    assert np.flatnonzero(shape(logits, **settings) > -np.inf).tolist() == kept


def test_zero_and_minus_zero_are_equal():
    assert np.flatnonzero(shape([-0.0, 0.0, -1, -3, -0.0, -2, -2], top_k=2) > -np.inf).tolist() == [0, 1, 4]
    assert np.flatnonzero(shape([-0.0, 0.0, -9, -9, -9, -9, -9], top_p=0.4) > -np.inf).tolist() == [0]


def test_ngrams_against_a_slow_loop():
    random = np.random.default_rng(7)
    history = random.integers(0, 3, (31, 17))
    lengths, sizes = random.integers(1, 18, 31), random.integers(0, 6, 31)
    result = processors.forbid_repeated_ngrams(
        jnp.zeros((31, 5)), jnp.asarray(sizes), jnp.asarray(history), jnp.asarray(lengths)
    )
    expected = np.zeros((31, 5))
    for b, (length, n) in enumerate(zip(lengths, sizes, strict=True)):
        ids = history[b, :length].tolist()
        grams = {tuple(ids[i : i + n]) for i in range(length - n + 1)} if n else set()
        for token in range(5):
            if len(ids) >= n and (*ids[length - n + 1 :], token) in grams:
                expected[b, token] = -np.inf
    assert np.isneginf(expected).sum() > 10
    np.testing.assert_array_equal(result, expected)


def test_top_logprobs():
    logits, chosen = TENSORS["logits"][:3], np.asarray([5, 130, 77])
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    own, ids, values = sampling.top_logprobs(jnp.asarray(logits), jnp.asarray(chosen), 7)
    np.testing.assert_allclose(own, expected[[0, 1, 2], chosen], rtol=1e-5)
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :7], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, np.asarray(ids), axis=1), values, rtol=1e-5)
    assert sampling.top_logprobs(jnp.asarray(logits), jnp.asarray(chosen), 0)[1].shape == (3, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"min_new_tokens": 2**31}, r"min_new_tokens=2147483648 must be .* below 2\*\*31"),
        ({"banned_tokens": [2**31] * 999}, r"banned_tokens=\[.{70,80}\.\.\. must be token ids .* below 2\*\*31"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"typical_p": 5e-324}, "typical_p=5e-324 must be in"),  # 0 in float32
        ({"temperature": 1e38}, "temperature=1e[+]38"),  # by which -inf is NaN
        ({"repetition_penalty": 1e-38}, "repetition_penalty=1e-38"),
        ({"typical_p": 0.0}, "typical_p=0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be a positive number"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias=.* must be token ids of at least 0"),
        ({"logit_bias": {1: -float("inf")}}, "logit_bias=.* must be of finite numbers; ban tokens instead"),
        ({"banned_tokens": [4, -1]}, r"banned_tokens=\[4, -1\]"),
        ({"forced_tokens": [1.5]}, r"forced_tokens=\[1.5\]"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("name", ["banned_tokens", "forced_tokens", "logit_bias"])
def test_ids_outside_of_the_vocabulary(name):
    row = Sampling(**{name: {131: 1.0} if name == "logit_bias" else [131]})
    with pytest.raises(ValueError, match=r"row 1 names tokens \[131\] outside of the vocabulary of 131"):
        SamplingArrays.of([Sampling(), row], 131)


def test_lists_of_ids_grow_by_powers_of_two():
    sizes = [SamplingArrays.of([Sampling(banned_tokens=range(n))], 99).banned.shape[1] for n in (0, 8, 9, 17)]
    assert sizes == [8, 8, 16, 32]

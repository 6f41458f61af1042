"""Sampling as accelerators run it, which is compiled here for the CPU: no decision of the host, the same tokens."""

import functools
import json
import re
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
    CASES = [json.loads(case) for case in file.metadata().values()]
V = TENSORS["logits"].shape[1]
TEXT = [TENSORS[name] for name in ("history", "lengths", "prompt_lengths", "end_ids")]
DRAWS = {"temperature": 0.8, "seed": 3}
EVERYTHING = [
    *(Sampling(**case | {"logit_bias": {int(k): v for k, v in case.get("logit_bias", {}).items()}}) for case in CASES),
    *(Sampling(**DRAWS, top_k=k) for k in (1, 2, 7, V - 1, V, V + 9, 2**31 - 1)),
    *(Sampling(**DRAWS, top_p=p) for p in (1e-30, 1e-6, 0.3, 0.5, 0.9, 0.999999, 1.0)),
    *(Sampling(**DRAWS, typical_p=p) for p in (1e-30, 0.2, 0.95, 1.0)),
    *(Sampling(**DRAWS, min_p=p) for p in (0.0, 1e-6, 0.5, 1.0)),
    Sampling(temperature=1e-30, top_p=0.5),
    Sampling(temperature=1e30, top_k=50, typical_p=0.9),
    Sampling(
        0.7, top_k=40, top_p=0.95, min_p=0.02, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, seed=9
    ),
    Sampling(no_repeat_ngram_size=7, frequency_penalty=-2.0, banned_tokens=[0, V - 1], logit_bias={5: 1e30, 9: -1e30}),
    Sampling(banned_tokens=range(V)),
    Sampling(1.0, forced_tokens=range(9), min_new_tokens=99),
    Sampling(),
]


def odd_logits(seed: int) -> np.ndarray:
    """A row for each of EVERYTHING: random, tied and forbidden ones, zeros of both signs, numbers far apart."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 3, (len(EVERYTHING), V)).astype(np.float32)
    logits[1::6] = np.round(logits[1::6])
    logits[2::6] = np.where(draw.random(logits[2::6].shape) < 0.7, -np.inf, logits[2::6])
    logits[3::6] = np.where(logits[3::6] < 0, np.float32(-0.0), np.float32(0.0))
    logits[4::6] *= 1e20
    logits[5::12] = -np.inf
    logits[5::12, 77] = 1.5
    return logits


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def texts(seed: int) -> list[np.ndarray]:
    """Histories with few different tokens, so that n-grams occur again."""
    draw, rows = np.random.default_rng(seed), len(EVERYTHING)
    lengths = draw.integers(1, 24, rows).astype(np.int32)
    prompts = np.minimum(lengths, draw.integers(1, 24, rows)).astype(np.int32)
    return [draw.integers(0, 4, (rows, 24)).astype(np.int32), lengths, prompts, np.asarray([2, 77], np.int32)]


Results = list[tuple[jax.Array, jax.Array]]


def results() -> Results:
    """The processed logits and the picks of EVERYTHING, by a program that is compiled for `jax.default_backend()`."""
    run, params = jax.jit(lambda *a: (sampling.process(*a), sampling.pick(*a))), SamplingArrays.of(EVERYTHING, V)
    assert not params.plain
    return [run(odd_logits(seed), params, *texts(seed)) for seed in range(3)]


@functools.cache
def on_the_cpu() -> Results:
    return results()


# To the bit, whether the searches look at many places at once or at few.
@pytest.mark.slow
@pytest.mark.parametrize("few", [1 << 19, 0], ids=["many places", "few places"])
def test_all_settings_give_what_they_give_on_the_cpu(few, monkeypatch):
    all_expected = on_the_cpu()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(processors, "_FEW", few)
    for actual, expected in zip(results(), all_expected, strict=True):
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[1], expected[1])
        assert (expected[1] < 0).any()
        assert len(set(expected[1].tolist())) > 20


def test_no_decision_waits_for_the_host(gpu):
    """Nothing is taken or repeated by what is computed; n-grams are the only loop, of a length that is known."""
    for rows, lengths in (([Sampling()], []), (EVERYTHING[-3:], ["7"]), ([Sampling(no_repeat_ngram_size=33)], ["63"])):
        params, none = SamplingArrays.of(rows, V), jnp.zeros(len(rows), jnp.int32)
        args = jnp.zeros((len(rows), V)), params, jnp.zeros((len(rows), 90), jnp.int32), none, none, none[:1]
        text = str(jax.make_jaxpr(sampling.pick)(*args))
        assert not re.search(r"\b(cond|while|sort)\[", text)
        assert re.findall(r"scan\[[^]]*?\blength=(\d+)", text) == lengths


def test_greedy_rows_alone_take_nothing_but_the_largest(gpu):
    params, none = SamplingArrays.of([Sampling(), Sampling(top_k=3, seed=4)], V), jnp.zeros(2, jnp.int32)
    assert params.plain
    pick = jax.jit(lambda *a: sampling.pick(*a))
    logits = jnp.asarray(TENSORS["logits"][:2]).at[1, [40, 90]].set(300.0)
    args = params, none[:, None], none, none, none[:1]
    assert pick(logits, *args).tolist() == [int(logits[0].argmax()), 40]
    assert pick(jnp.full((2, V), -jnp.inf), *args).tolist() == [-1, -1]
    for place in (0, 64, V - 1):
        assert pick(logits.at[0, place].set(jnp.nan).at[1, place].set(jnp.inf), *args).tolist() == [-1, -1]


@pytest.mark.parametrize(
    "row", [Sampling(), pytest.param(Sampling(1.0, top_k=40, no_repeat_ngram_size=3), marks=pytest.mark.slow)]
)
def test_derivatives_and_maps_pass_by(row, gpu):
    """As in a policy gradient, where the log-probability of what was picked is differentiated."""
    params, none = SamplingArrays.of([row] * 2, V), jnp.zeros(2, jnp.int32)

    def total(logits):
        picks = sampling.pick(logits, params, none[:, None], none, none, none[:1])
        return jnp.take_along_axis(logits, picks[:, None], axis=1).sum()

    logits = jnp.asarray(TENSORS["logits"][:2])
    gradients = jax.jit(jax.grad(total))(logits)
    assert gradients.sum() == 2
    assert (gradients.max(axis=1) == 1).all()
    assert jnp.allclose(jax.jit(jax.vmap(total))(jnp.stack([logits, logits])), total(logits))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {4: 0.1}},
        {"banned_tokens": (0,)},
        {"forced_tokens": np.asarray([0])},
        {"no_repeat_ngram_size": 8},
        {"min_new_tokens": 1},
    ],
)
def test_any_setting_of_any_row_takes_the_one_other_program(settings, gpu):
    kind = jax.tree.structure(SamplingArrays.of([Sampling(), Sampling(**settings)], V))
    assert kind == jax.tree.structure(SamplingArrays.of([Sampling(1.0, top_p=0.5)] * 2, V))
    assert kind != jax.tree.structure(SamplingArrays.of([Sampling(), Sampling(top_k=1, min_p=0.1)], V))

"""With packed weights on the CPU, a row's answer has the same bits whatever is beside it, and however many rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.sampling import Sampling, SamplingArrays

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 6
PROMPTS = [[5], [11], [7], [96], [2], [50], [61], [33], [12], [4], [88], [70], [21], [9], [40], [3]]
DRAWS = Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=7)


@pytest.fixture(scope="module", params=["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def packed(tiny, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("packed")
    phi3_jax.save(tiny, folder / "floats")
    options = {"dtype": "bfloat16"} if request.param == "bfloat16" else {"quantize": request.param}
    return phi3_jax.load(folder / "floats", **options, layout="packed")


def written(checkpoint, prompts, sampling=None, done=(), by=None):
    """Tokens, their log-probabilities and the keys of each row, after STEPS turns from prompts of one token."""
    config, B = checkpoint.config, len(prompts)
    one = jnp.ones(B, jnp.int32)
    arrays = SamplingArrays.of(sampling or [Sampling()] * B, config.vocab_size).for_any()
    settings = decoding.Settings(one * STEPS, jnp.asarray([0]), arrays, one)
    tokens = jnp.asarray([[*prompt, *[0] * STEPS] for prompt in prompts])
    state = decoding.begin(config, settings, tokens, 16, "bfloat16", 0)
    state = dataclasses.replace(state, done=jnp.asarray([row in done for row in range(B)]))
    state = (by or by_decode)(checkpoint, state, settings)
    ended = np.asarray(state.lengths)
    parts = [state.tokens, state.logprobs.chosen, state.cache.k.swapaxes(0, 1), state.cache.v.swapaxes(0, 1)]
    return [[np.asarray(part)[row] for part in parts] for row in range(B) if ended[row] > 1]


def by_decode(checkpoint, state, settings):
    return decoding.decode(checkpoint.config, checkpoint.params, state, settings, jnp.int32(STEPS))[0]


def by_halves(checkpoint, state, settings):
    """As under a grammar, which allows all tokens here."""
    allowed = jnp.full((len(state.tokens), 4), 0xFFFFFFFF, jnp.uint32)
    for _ in range(STEPS):
        state, last = decoding.step(checkpoint.config, checkpoint.params, state)
        state = decoding.answer(checkpoint.config, checkpoint.params, state, last, settings, allowed)
    return state


def same(rows, others):
    for row, other in zip(rows, others, strict=True):
        for ours, theirs in zip(row, other, strict=True):
            np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize("sizes", [(1,), pytest.param((2, 3, 4, 16), marks=pytest.mark.slow)], ids=str)
def test_a_row_among_any_number_of_others(packed, sizes):
    together = written(packed, PROMPTS[:8])
    assert len({tuple(row[0].tolist()) for row in together}) == 8
    for B in sizes:
        same(written(packed, PROMPTS[:B])[:8], together[:B])
        other = PROMPTS[:8][-B:]
        same(written(packed, other), together[-B:])


def test_a_row_beside_rows_that_draw_or_are_done(packed):
    alone, drawn = written(packed, PROMPTS[:1]), written(packed, PROMPTS[:1], [DRAWS])
    assert alone[0][0].tolist() != drawn[0][0].tolist()
    sampling = [Sampling(), DRAWS, Sampling(repetition_penalty=1.5), DRAWS]
    beside = written(packed, [PROMPTS[0], PROMPTS[0], *PROMPTS[2:4]] * 2, sampling * 2)
    same(beside[:2], [alone[0], drawn[0]])
    same(written(packed, PROMPTS[:8], done=range(1, 8)), alone)


@pytest.mark.slow
def test_the_two_halves_of_a_turn(packed):
    together = written(packed, PROMPTS[:8])
    same(written(packed, PROMPTS[:4], [DRAWS, *[Sampling()] * 3], by=by_halves)[1:], together[1:4])

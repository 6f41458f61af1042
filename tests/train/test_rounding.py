"""Rounding to bfloat16 by chance: its mean, its edges, and what steps make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from training_batches import PARTS, run, settings, stack

from phi3_jax.train import step
from phi3_jax.train.rounding import stochastic_round

LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
SMALLEST = 2.0**-133  # the smallest subnormal bfloat16


def _draws(x, count):
    keys = jax.random.split(jax.random.key(3), count)
    rounded = jax.jit(jax.vmap(stochastic_round, (None, 0)))(jnp.asarray(x, jnp.float32), keys)
    assert rounded.dtype == jnp.bfloat16
    return np.asarray(rounded).astype(np.float64)


def test_the_mean_is_the_number_itself():
    """Within 5 standard errors; each draw is one of the two neighbours."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=40) * 10.0 ** rng.integers(-30, 30, 40)).astype(np.float32)
    # Beside powers of two, where the neighbours' distances differ, and subnormal numbers.
    x = np.concatenate([x, np.float32([1 - 1e-4, 1 + 1e-4, -2.003, 257, 1e-39, -3e-40, 0.3 * SMALLEST])])
    count = 20000
    drawn = _draws(x, count)
    bits = x.view(np.uint32)
    below = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    assert ((drawn == below) | (drawn == above)).all()
    share = (x - below) / (above - below)
    error = np.abs(above - below) * np.sqrt(share * (1 - share) / count)
    assert (np.abs(drawn.mean(0) - x) <= 5 * error).all()
    assert (drawn.std(0) > 0).all()
    # Neighbouring elements, and neighbouring keys, do not move together.
    tails = _draws(np.full(400, 1 + 2.0**-8, np.float32), 400) > 1
    for pairs in (tails[:, 1:] == tails[:, :-1], tails[1:] == tails[:-1]):
        assert abs(pairs.mean() - 0.5) < 5 * 0.5 / 400


def test_what_bfloat16_has_stays_and_what_is_finite_stays_finite():
    exact = np.array([0.0, -0.0, 1.0, -258.0, LARGEST, -LARGEST, SMALLEST, -5 * SMALLEST, 2.0**-126])
    exact = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    drawn = _draws(exact, 50)
    np.testing.assert_array_equal(drawn, np.broadcast_to(exact, drawn.shape))
    np.testing.assert_array_equal(np.signbit(drawn), np.broadcast_to(np.signbit(exact), drawn.shape))
    odd = np.float32([np.inf, -np.inf, 3.4e38, -3.4028234e38])
    np.testing.assert_array_equal(_draws(odd, 50), [[np.inf, -np.inf, LARGEST, -LARGEST]] * 50)
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(_draws(nan, 50)).all()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_small_updates_of_bfloat16_weights_are_not_lost(tiny, monkeypatch):
    """At this rate a weight moves by a small part of the distance of bfloat16 numbers in a step."""
    s = settings(dtype="bfloat16", lr=1e-4)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    batches = [stack(PARTS[number % 3]) for number in range(6)]
    state, _, curve = run(s, tiny.config, params, batches)
    float32, _, expected = run(settings(lr=1e-4), tiny.config, params, batches)
    np.testing.assert_allclose(curve["loss"], expected["loss"], rtol=0.02)

    bad = dataclasses.replace(batches[0], weights=np.where(batches[0].weights > 0, np.inf, 0).astype(np.float32))
    skipped, _, _ = run(s, tiny.config, params, [*batches, bad])
    for got, same in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(skipped.trainable), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.view(jnp.uint16), same.view(jnp.uint16))

    monkeypatch.setattr(step, "apply_updates", lambda params, updates, key: optax.apply_updates(params, updates))
    nearest, _, _ = run(dataclasses.replace(s, log_every=2), tiny.config, params, batches)  # not the cached function

    def moved(trained):
        pairs = zip(jax.tree.leaves(trained.trainable), jax.tree.leaves(params), strict=True)
        return np.concatenate([np.ravel(new.astype(jnp.float32) - old.astype(jnp.float32)) for new, old in pairs])

    # The sum of the moves in float32's direction: all of it by chance, little of it to the nearest.
    direction, target = np.sign(moved(float32)), np.abs(moved(float32)).sum()
    assert (moved(state) * direction).sum() == pytest.approx(target, rel=0.15)
    assert (moved(nearest) * direction).sum() < 0.5 * target

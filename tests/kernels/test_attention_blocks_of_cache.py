"""Attention over a cache in blocks of slots, against the reference, which reads all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.kernels.attention import blockwise, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, B, T, N, K, H, S = 3, 3, 7, 6, 2, 12, 29
LAYER = 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "_SIDES", (4, 4))


def case(ends, dtype=jnp.float32, window=None, padded=H):
    """Rows that hold so many tokens, each at slot p mod S, the last T of them as queries (fewer: padding before)."""
    rng = np.random.default_rng(2)
    q_positions, k_positions = np.full((B, T), -1, np.int32), np.full((B, S), -1, np.int32)
    for row, end in enumerate(ends):
        for position in range(max(0, end - S), end):
            k_positions[row, position % S] = position
        new = np.arange(max(0, end - T), end)
        q_positions[row, T - len(new) :] = new
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    shape = (L, B, K, S, padded)
    k, v = (rng.normal(size=shape) for _ in range(2))
    k[..., H:] = v[..., H:] = 0
    scales = [None, None]
    if dtype == jnp.int8:
        k, v = (np.round(40 * each).clip(-127, 127) for each in (k, v))
        scales = [jnp.asarray(rng.uniform(0.01, 0.05, shape[:-1]), jnp.float32) for _ in range(2)]
    kv = KeysValues(jnp.asarray(k, dtype), jnp.asarray(v, dtype), *scales, jnp.int32(LAYER))
    return q, kv, Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window)


def in_blocks(q, kv, visible, scores=1):
    return jax.jit(blockwise.cached_in_blocks, static_argnums=3)(q, kv, visible, scores)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ends": (29, 20, 3)}, marks=pytest.mark.slow),
        {"ends": (40, 33, 29), "window": 12},  # a ring buffer
        {"ends": (9, 0, 17), "dtype": jnp.int8, "padded": 16},
        pytest.param({"ends": (12, 25, 8), "dtype": jnp.bfloat16, "window": 5}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(options):
    q, kv, visible = case(**options)
    expected = np.asarray(xla.attention(q, kv, visible))
    seen = np.asarray(visible.q_positions) >= 0
    for scores in (1, 4 * T * B * N):  # queries in two blocks, which overlap, or in one
        got = np.asarray(in_blocks(q, kv, visible, scores))
        np.testing.assert_allclose(got[seen], expected[seen], rtol=0, atol=2e-6 * np.abs(expected).max())
        assert not got[~seen].any()


def test_slots_that_nothing_sees_are_not_read():
    q, kv, visible = case((14, 11, 9), window=3)  # positions 2 to 13
    unread = jnp.isin(jnp.arange(S), jnp.arange(16, S))
    kv = KeysValues(kv.k, jnp.where(unread[:, None], jnp.nan, kv.v), layer=kv.layer)
    assert not np.isnan(in_blocks(q, kv, visible)).any()
    assert np.isnan(xla.attention(q, kv, visible)).any()
    other = jnp.arange(L)[:, None, None, None, None] != LAYER
    kv = KeysValues(kv.k, jnp.where(other, jnp.nan, jnp.where(unread[:, None], 0, kv.v)), layer=kv.layer)
    np.testing.assert_allclose(in_blocks(q, kv, visible), xla.attention(q, kv, visible), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_derivative_is_the_reference_s():
    q, kv, visible = case((9, 20, 17), window=11)

    def gradient(function):
        return jax.jit(jax.grad(lambda q: jnp.sin(function(q, kv, visible)).sum()))(q)

    expected = gradient(xla.attention)
    np.testing.assert_allclose(gradient(blockwise.cached), expected, rtol=0, atol=1e-5)

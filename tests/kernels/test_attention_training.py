"""Attention for training against the reference, whose derivative is XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.kernels.attention import training, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, N, K, H = 3, 29, 6, 2, 12


def case(dtype):
    """A whole row, one with padding on the left, and one of three segments and padding on the right."""
    rng = np.random.default_rng(1)
    positions, segments = np.full((B, T), -1, np.int32), np.zeros((B, T), np.int32)
    positions[0], positions[1, 8:] = np.arange(T), np.arange(T - 8)
    for number, where in enumerate((slice(0, 7), slice(7, 8), slice(8, 25))):
        positions[2, where], segments[2, where] = np.arange(where.stop - where.start), number
    segments[2, 25:] = 3
    visible = Visibility(*map(jnp.asarray, (positions, positions, segments, segments)), window=11)
    q, k, v = (2 * rng.normal(size=shape) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    return [jnp.asarray(each, dtype) for each in (q, k, v)], visible


def value_and_gradients(function, dtype):
    arguments, visible = case(dtype)
    strange = jnp.cos(jnp.arange(B * T * N * H)).reshape(B, T, N, H)

    def loss(q, k, v):
        out = function(q, KeysValues(k, v), visible)
        return (out * strange).astype(jnp.float32).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)


def reference(q, kv, visible):
    return xla.attention(q, kv, visible)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients_equal_those_of_the_reference(dtype, tolerance):
    """Queries of padding, which see nothing, have gradients, too."""
    got, expected = (value_and_gradients(f, dtype) for f in (training.attention, reference))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_the_backward_pass_keeps_no_probabilities():
    arguments, visible = case("float32")

    def kept(function):
        _, backward = jax.vjp(lambda q, k, v: function(q, KeysValues(k, v), visible), *arguments)
        return max(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(reference) == B * N * T * T
    assert kept(training.attention) == max(B * T * N * H, B * T * T)

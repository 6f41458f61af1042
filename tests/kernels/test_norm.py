"""RMSNorm: the CPU kernel and XLA against float64, and a row's bits beside other rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.kernels import split_layers
from phi3_jax.kernels.norm import rms_norm
from phi3_jax.model import decoder

EPS = 1e-5


def expected(x, weight, eps=EPS):
    """By the definition, in float64."""
    x, weight = (np.asarray(each, np.float64) for each in (x, weight))
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def operands(dtype, weights, shape=(3, 2, 37), layers=3, seed=0):
    draw = np.random.default_rng(seed)
    x, weight = draw.normal(size=shape), 1 + draw.normal(size=(layers, shape[-1]))
    return x.astype(dtype), weight.astype(weights)


@functools.partial(jax.jit, static_argnames=("eps", "implementation"))
def normed(x, weight, layer, eps=EPS, implementation="cpu"):
    return rms_norm(x, weight, eps, jnp.asarray(layer), implementation)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 8e-7), ("bfloat16", 2**-7)])
def test_against_float64_at_odd_sizes(dtype, error, weights):
    for D, implementation in ((1, "cpu"), (37, "cpu"), (37, "xla"), (131, "cpu"), (577, "cpu")):
        x, weight = operands(dtype, weights, (3, 2, D))
        got = normed(x, weight, 2, implementation=implementation)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        np.testing.assert_allclose(np.asarray(got, np.float64), expected(x, weight[2]), rtol=error, atol=1e-30)


def test_numbers_far_from_one():
    x, weight = operands("float32", "float32")
    for size in np.float32([0, 1e-35, 1e-30, 1e-3, 1e3, 1e17]):
        for eps in np.float32([1e-30, 1e-5, 1e10]):
            with np.errstate(under="ignore"):
                small = x * size
            got = normed(small, weight, 0, float(eps))
            np.testing.assert_allclose(np.asarray(got), expected(small, weight[0], eps), rtol=1e-6, atol=1e-36)


def test_a_number_that_is_none_spoils_its_own_row_alone():
    x, weight = operands("float32", "bfloat16", (5, 37))
    spoiled = x.copy()
    spoiled[1, 36], spoiled[3, 0] = np.nan, np.inf
    got, whole = (np.asarray(normed(each, weight, 1)) for each in (spoiled, x))
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [False, True, False, False, False])
    assert np.isnan(got[3, 0])  # infinity divided by infinity
    np.testing.assert_array_equal(got[[0, 2, 4]], whole[[0, 2, 4]])


def test_no_rows_and_more_than_one_thread_takes():
    none, weight = operands("float32", "float32", (0, 37))
    assert normed(none, weight, 0).shape == (0, 37)
    many = operands("float32", "float32", (2500, 37))[0]
    np.testing.assert_array_equal(np.asarray(normed(many, weight, 0))[2400:], normed(many[2400:], weight, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_beside_any_number_of_others(dtype):
    x, weight = operands(dtype, "float32", (16, 1, 576))
    together = np.asarray(normed(x, weight, 1, implementation=None))
    for B in (1, 2, 3, 8):
        np.testing.assert_array_equal(normed(x[:B], weight, 1, implementation=None), together[:B])
    np.testing.assert_array_equal(normed(x.swapaxes(0, 1), weight, 1, implementation=None)[0], together[:, 0])


def test_batched_by_vmap():
    x, weight = operands("float32", "float32")
    layers = np.asarray([2, 0, 1])
    together = jax.jit(jax.vmap(normed, (0, None, None)))(x, weight, 1)
    np.testing.assert_array_equal(together, normed(x, weight, 1))
    each = jax.jit(jax.vmap(normed, (0, None, 0)))(x, weight, layers)
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(each[i], normed(x, weight, layer)[i])


def test_gradients_are_those_of_xla():
    x, weight = operands("float32", "float32")

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(implementation, *args):
        return jax.grad(lambda x, weight: (normed(x, weight, 1, EPS, implementation) ** 2).sum(), (0, 1))(*args)

    for ours, theirs in zip(slopes(None, x, weight), slopes("xla", x, weight), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_in_a_buffer_per_layer():
    x, weight = operands("float32", "float32")
    own = split_layers({"layers": {"norm": jnp.asarray(weight)}})["layers"]["norm"]
    np.testing.assert_array_equal(jax.jit(lambda x: rms_norm(x, own, EPS, 1))(x), normed(x, weight, 1))


def test_what_the_kernel_does_not_take():
    x, weight = operands("float32", "float32")
    with pytest.raises(ValueError, match="the CPU kernel normalises rows of float32 or bfloat16, but x is float16"):
        normed(x.astype("float16"), weight, 0)
    half = normed(x.astype("float16"), weight, 0, implementation=None)
    np.testing.assert_allclose(np.asarray(half, np.float64), expected(x, weight[0]), rtol=4e-3, atol=4e-3)
    for wrong, layer, said in ((weight[:, 1:], 0, r"the weights have shape \[3, 36\]"), (weight, 3, "layer is 3")):
        with pytest.raises(Exception, match=said):
            jax.block_until_ready(normed(x, wrong, layer))


def test_the_decoder_uses_it():
    x, weight = operands("float32", "float32")
    own = jax.jit(lambda x: decoder.rms_norm(x, weight, EPS, jnp.int32(1)))
    np.testing.assert_array_equal(own(x), normed(x, weight, 1))

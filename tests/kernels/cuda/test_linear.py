"""Products with integers by the kernels for NVIDIA cards, emulated on the CPU, against float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax.kernels import LoraTensor, QuantizedTensor
from phi3_jax.kernels.linear import cuda, gated, linear

pytestmark = pytest.mark.usefixtures("emulated")


def integers(outputs, inputs, bits, group, symmetric, seed=0):
    """A random weight, whose padding is not zero."""
    random = np.random.default_rng(seed)
    groups = -(-inputs // group)
    values = random.integers(1 if bits == 8 else 0, 256, (outputs, groups * group * bits // 8)).astype(np.uint8)
    scales = (random.random((outputs, groups)) * 0.01 + 0.001).astype(np.float16)
    mins = None if symmetric else jnp.asarray((random.standard_normal((outputs, groups)) * 0.1).astype(np.float16))
    return QuantizedTensor(jnp.asarray(values), jnp.asarray(scales), mins, bits, inputs)


def exact(x, weight):
    """The product in float64, by the meaning of a QuantizedTensor."""
    values = np.asarray(weight.values)
    if weight.bits == 4:
        values = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
    scales = np.repeat(np.asarray(weight.scales, np.float64), weight.group, -1)
    if weight.mins is None:
        floats = (values - 2.0 ** (weight.bits - 1)) * scales
    else:
        floats = values * scales + np.repeat(np.asarray(weight.mins, np.float64), weight.group, -1)
    return np.asarray(x, np.float64) @ floats[:, : weight.columns].T


def check(rows, outputs, inputs, bits, group, symmetric, dtype):
    weight = integers(outputs, inputs, bits, group, symmetric)
    x = np.random.default_rng(1).standard_normal((rows, inputs)).astype(np.float32)
    expected = exact(x.astype(ml_dtypes.bfloat16), weight)
    found = cuda.linear(jnp.asarray(x), weight, None, dtype)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    size = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=2.0**-8 if dtype == jnp.bfloat16 else 0, atol=2e-6 * size
    )


KINDS = list(itertools.product((4, 8), (32, 64, 128), (True, False)))
# Rows at the borders of a tile, of kernels and of blocks; outputs and inputs that fill none of them.
SHAPES = [(1, 37, 160), (2, 16, 1200), (7, 33, 128), (8, 17, 97), (9, 15, 3000), (16, 5, 33), (17, 31, 288)]
SHAPES += [(32, 9, 64), (33, 129, 95), (65, 130, 224), (129, 7, 320)]


def test_more_scales_than_fit_into_shared_memory():
    check(1, 3, 20032, 8, 32, False, jnp.dtype(jnp.float32))


@pytest.mark.parametrize(("rows", "outputs"), [(1, 8), (9, 24), (32, 40), (33, 72), (70, 136)])
def test_gated_features(rows, outputs):
    """up * silu(gate), with outputs that fill no block."""
    for bits, symmetric in itertools.product((4, 8), (True, False)):
        weight = integers(2 * outputs, 160, bits, 32, symmetric)
        x = np.random.default_rng(1).standard_normal((rows, 160)).astype(ml_dtypes.bfloat16)
        gate, up = np.split(exact(x, weight), 2, axis=-1)
        found = cuda.linear(jnp.asarray(x)[None], weight, None, jnp.float32, gated=True)
        np.testing.assert_allclose(found[0], up * gate / (1 + np.exp(-gate)), rtol=2e-5, atol=2e-5)


def test_what_does_not_fit_is_told():
    weight = integers(12, 64, 4, 32, True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="gate and up have 12 rows, expected a multiple of 16"):
        cuda.linear(jnp.ones((1, 64)), weight, None, None, gated=True)
    wrong = dataclasses.replace(weight, scales=weight.scales[:, :1])
    wrong = dataclasses.replace(wrong, values=jnp.tile(wrong.values, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="1 groups for 192 inputs, expected groups of 32, 64 or 128"):
        cuda.linear(jnp.ones((1, 64)), wrong, None, None)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_products(rows, outputs, inputs):
    for i, (bits, group, symmetric) in enumerate(KINDS):
        if rows <= 32 or i % 3 == rows % 3:
            check(rows, outputs, inputs, bits, group, symmetric, jnp.dtype((jnp.float32, jnp.bfloat16)[i % 2]))


@pytest.fixture
def traced_for_a_gpu(monkeypatch):
    """Programs are traced as on a GPU; here they run the reference, which is in them, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("function", [linear, gated])
def test_programs_for_a_gpu_call_the_kernel_and_derivatives_are_the_references(traced_for_a_gpu, function):
    weight, x = integers(32, 64, 4, 32, False), jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)))
    adapter = [jnp.full((2, 64), 0.1), jnp.full((32, 2), 0.2)]
    floats = weight.dequantize()

    def loss(x, a, b, base):
        return (function(x, LoraTensor(base, a, b, None, None, 2.0, 0.0)) ** 2).sum()

    assert "phi3_cuda_linear" in str(jax.make_jaxpr(function)(x, weight))
    assert "phi3_cuda_linear" in str(jax.make_jaxpr(loss)(x, *adapter, weight))  # the base's product
    assert "phi3_cuda_linear" not in str(jax.make_jaxpr(function)(x, floats))
    found = jax.grad(loss, (0, 1, 2))(x, *adapter, weight)
    for one, expected in zip(found, jax.grad(loss, (0, 1, 2))(x, *adapter, floats), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_a_stack():
    layers = [integers(20, 96, 8, 32, True, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 96)), jnp.bfloat16)
    found = linear(x, stack, jnp.int32(1), jnp.float32, implementation="cuda")
    np.testing.assert_allclose(found, exact(x, layers[1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="multiply integers by rows"):
        linear(x, jnp.zeros((20, 96)), implementation="cuda")

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import phi3_jax
from phi3_jax.kernels import PackedTensor, QuantizedTensor, Unavailable
from phi3_jax.kernels.linear import gated, linear
from phi3_jax.kernels.linear.packed import Packing, pack
from phi3_jax.kernels.native import build
from phi3_jax.model import decoder

pytestmark = [
    pytest.mark.skipif(
        build.why_unavailable() is not None, reason=f"there are no kernels here: {build.why_unavailable()}"
    ),
    pytest.mark.usefixtures("quick_compilation"),
]
SHAPES = [(3, 37, 29), (2, 129, 96), (2, 64, 131)]
KINDS = [(bits, group, symmetric) for bits in (8, 4) for group in (32, 64, 128) for symmetric in (True, False)]


def integers(shape, bits, group, symmetric, seed=0):
    random = np.random.default_rng(seed)
    *outputs, inputs = shape
    groups = -(-inputs // group)
    values = random.integers(1 if bits == 8 else 0, 256, (*outputs, groups * group * bits // 8)).astype(np.uint8)
    scales = (random.random((*outputs, groups)) * 0.01 + 0.001).astype(np.float16)
    mins = None if symmetric else jnp.asarray((random.standard_normal((*outputs, groups)) * 0.1).astype(np.float16))
    return QuantizedTensor(jnp.asarray(values), jnp.asarray(scales), mins, bits, inputs)


def packed_integers(tensor):
    return pack({"layers": {"w": tensor}})["layers"]["w"] if len(tensor.shape) == 3 else pack({"w": tensor})["w"]


def plain(tensor):
    """The meaning of a QuantizedTensor, in float64."""
    values = np.asarray(tensor.values)
    if tensor.bits == 4:
        values = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    spread = [
        np.repeat(np.asarray(x, np.float64), tensor.group, -1) for x in (tensor.scales, tensor.mins) if x is not None
    ]
    if tensor.mins is None:
        return ((values - 2.0 ** (tensor.bits - 1)) * spread[0])[..., : tensor.columns]
    return (values * spread[0] + spread[1])[..., : tensor.columns]


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_panels_hold_every_weight_and_give_rows(shape):
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    for given in (weight, weight.astype(ml_dtypes.bfloat16)):
        tensor = pack({"layers": {"w": jnp.asarray(given)}})["layers"]["w"]
        assert tensor.shape == shape
        for layer in range(shape[0]):
            np.testing.assert_array_equal(tensor.dequantize(jnp.int32(layer)), rounded[layer])
    one = pack({"w": jnp.asarray(weight[1])})["w"]
    ids = jnp.asarray([[0, shape[1] - 1], [7, -1], [shape[1], 3]])
    rows = np.asarray(one.rows(ids))
    np.testing.assert_array_equal(rows[[0, 0, 1, 2], [0, 1, 0, 1]], rounded[1][[0, shape[1] - 1, 7, 3]])
    assert np.isnan(rows[1, 1]).all()
    assert np.isnan(rows[2, 0]).all()


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_integer_panels_mean_what_the_rows_meant(bits, group, symmetric):
    for shape in SHAPES:
        rows = integers(shape, bits, group, symmetric)
        tensor, expected = packed_integers(rows), plain(rows)
        assert (tensor.shape, tensor.group) == (shape, group)
        for layer in range(shape[0]):
            np.testing.assert_allclose(rows.layer(layer).dequantize(), expected[layer], atol=1e-6)
            np.testing.assert_allclose(tensor.dequantize(jnp.int32(layer)), expected[layer], atol=1e-6)
        one = jax.tree.map(lambda leaf: leaf[1], rows)
        ids = jnp.asarray([5, shape[1] - 1, 0, shape[1]])
        for each in (one, packed_integers(one)):
            got = np.asarray(each.rows(ids))
            np.testing.assert_allclose(got[:3], expected[1][[5, -1, 0]], atol=1e-6)
            assert np.isnan(got[3]).all()


@pytest.mark.parametrize("rows", [1, 3, 7, 33])
def test_bfloat16_products_are_near_those_of_the_reference(rows):
    random = np.random.default_rng(2)
    weight = random.standard_normal((3, 129, 95)).astype(np.float32)
    tensor, x = pack({"layers": {"w": jnp.asarray(weight)}})["layers"]["w"], random.standard_normal((2, rows, 95))
    exact = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ weight[2].astype(ml_dtypes.bfloat16).astype(np.float64).T
    for layer in (jnp.int32(2), jnp.int16(2)):
        got = jax.jit(linear)(jnp.asarray(x, jnp.float32), tensor, layer)
        np.testing.assert_allclose(got, exact, atol=2e-5 * np.abs(exact).max())
    reference = linear(jnp.asarray(x, jnp.float32), tensor, jnp.int32(2), implementation="xla")
    np.testing.assert_allclose(got, reference, atol=0.01 * np.abs(exact).max())
    assert linear(jnp.asarray(x, jnp.bfloat16), tensor, jnp.int32(2)).dtype == jnp.bfloat16


def test_rows_under_vmap_are_more_rows_of_one_product():
    random = np.random.default_rng(8)
    weight = pack({"layers": {"w": jnp.asarray(random.standard_normal((3, 129, 95)), jnp.float32)}})["layers"]["w"]
    x = jnp.asarray(random.standard_normal((2, 3, 4, 95)), jnp.float32)

    def product(x, layer=2):
        return linear(x, weight, jnp.int32(layer))

    twice = jax.jit(jax.vmap(jax.vmap(product), in_axes=1, out_axes=1))
    np.testing.assert_allclose(twice(x), product(x), atol=1e-5)
    assert "while" not in twice.lower(x).as_text()  # else each row would read all weights again


@pytest.mark.slow
def test_products_under_vmap_of_weights_and_of_derivatives():
    random = np.random.default_rng(8)
    weight = pack({"layers": {"w": jnp.asarray(random.standard_normal((3, 129, 95)), jnp.float32)}})["layers"]["w"]
    x = jnp.asarray(random.standard_normal((2, 3, 4, 95)), jnp.float32)

    def product(x, layer=2):
        return linear(x, weight, jnp.int32(layer))

    layers = jax.vmap(product)(x[:, 0], jnp.arange(2))
    np.testing.assert_allclose(layers, [product(x[i, 0], i) for i in range(2)], atol=1e-5)
    apart = jax.tree.map(lambda leaf: leaf[:, None], weight)  # a batch of weights
    found = jax.vmap(lambda x, weight: linear(x, weight, jnp.int32(0)))(jnp.stack([x[0]] * 3), apart)
    np.testing.assert_allclose(found, [product(x[0], i) for i in range(3)], atol=1e-5)

    def loss(x):
        return (product(x) ** 2).sum()

    slopes = jax.grad(lambda x: jax.vmap(loss)(x).sum())(x)
    np.testing.assert_allclose(slopes, jax.vmap(jax.grad(loss))(x), rtol=1e-4)
    np.testing.assert_allclose(slopes, jax.grad(loss)(x), rtol=1e-4)
    forward = jax.jvp(jax.vmap(loss), (x,), (x,))[1]
    np.testing.assert_allclose(forward, jax.vmap(lambda x: jax.jvp(loss, (x,), (x,))[1])(x), rtol=1e-4)


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_integer_products_are_those_of_activations_rounded_by_group(bits, group, symmetric):
    rows = integers((3, 71, 190), bits, group, symmetric)
    x = np.random.default_rng(3).standard_normal((5, 190)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, -190 % group))).reshape(5, -1, group)
    step = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    seen = (np.rint(padded / step) * step).astype(np.float64).reshape(5, -1)[:, :190]
    expected = seen @ plain(rows)[1].T
    got = linear(jnp.asarray(x), packed_integers(rows), jnp.int32(1), implementation="cpu")
    # A quotient that lies on half a step may be rounded to either side.
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())
    assert np.abs(got - expected).mean() < 2e-4 * np.abs(expected).max()
    exact = linear(jnp.asarray(x), rows, jnp.int32(1))
    np.testing.assert_allclose(exact, x @ plain(rows)[1].T, atol=1e-4)
    np.testing.assert_allclose(
        linear(jnp.asarray(x), packed_integers(rows), jnp.int32(1), implementation="xla"), exact, atol=1e-4
    )


def test_what_is_wrong_reaches_python_as_an_error():
    tensor = packed_integers(integers((3, 71, 190), 4, 32, True))
    x = jnp.ones((2, 190))
    for layer in (3, -1):
        with pytest.raises(Exception, match="layer"):
            linear(x, tensor, jnp.int32(layer), implementation="cpu").block_until_ready()
    for broken in (
        dataclasses.replace(tensor, shape=(3, 200, 190)),
        dataclasses.replace(tensor, scales=tensor.scales[:, :, :2]),
        dataclasses.replace(tensor, mins=tensor.scales[:1]),
        dataclasses.replace(tensor, kind="int8"),
    ):
        with pytest.raises(Exception, match="phi3_linear_quantized"):
            linear(x, broken, jnp.int32(0), implementation="cpu").block_until_ready()
    with pytest.raises(ValueError, match="layout='packed'"):
        linear(x, jnp.ones((71, 190)), implementation="cpu")
    with pytest.raises(ValueError, match="do not go into one"):
        Packing((71, 190), "int4").put_integers(0, np.zeros((71, 96), np.uint8), *[np.zeros((71, 6), np.float16)] * 2)


def test_without_kernels_packed_weights_run_on_xla(monkeypatch):
    tensor = packed_integers(integers((3, 71, 190), 4, 32, False))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 190)), jnp.float32)
    expected = linear(x, tensor, jnp.int32(1), implementation="xla")
    monkeypatch.setattr(build, "_load_once", lambda: "no compiler")
    np.testing.assert_array_equal(linear(x, tensor, jnp.int32(1)), expected)
    with pytest.raises(Unavailable, match="no compiler"):
        linear(x, tensor, jnp.int32(1), implementation="cpu")
    with pytest.raises(Unavailable, match="no compiler"):
        Packing((71, 190), "int4")


def test_a_program_for_another_platform_does_not_call_the_kernels():
    tensor = packed_integers(integers((3, 71, 190), 4, 32, False))
    traced = jax.jit(linear).trace(jnp.ones((2, 190)), tensor, jnp.int32(0))
    assert "phi3_linear_quantized" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "phi3_linear_quantized" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_packed_model_gives_the_logits_of_its_weights(tiny, monkeypatch):
    """The reference rounds as the kernels do: weights to bfloat16, and what they are multiplied with."""
    config, tokens = tiny.config, jnp.asarray(np.random.default_rng(5).integers(4, 97, (2, 9)))
    params = pack(tiny.params)
    assert isinstance(params["layers"]["mlp"]["down_proj"]["weight"], PackedTensor)
    cache = phi3_jax.KVCache.create(config, 2, 11)
    got, _ = phi3_jax.Phi3(config).apply({"params": params}, tokens, cache=cache)
    assert got.dtype == jnp.float32

    def rounded(leaf):
        return leaf.astype(jnp.bfloat16).astype(jnp.float32)

    for function in (linear, gated):
        of_rounded = functools.partial(
            lambda function, x, *rest, **named: function(rounded(x), *rest, **named), function
        )
        monkeypatch.setattr(decoder, function.__name__, of_rounded)
    weights = jax.tree.map(
        lambda leaf: rounded(leaf) if leaf.shape[-2:] != (3, 24) and leaf.ndim > 1 else leaf, tiny.params
    )
    expected = phi3_jax.Phi3(config).apply({"params": weights}, tokens)
    # Where a sum lies between two bfloat16 numbers, the kernels' order of adding may round it to the other one.
    np.testing.assert_allclose(got, expected, atol=0.01)

"""The kernel that adds an adapter's update, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.kernels import LoraTensor, why_unavailable
from phi3_jax.kernels.linear import cpu, linear, xla
from phi3_jax.kernels.linear.packed import pack

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")


def arrays(layers: int, rank: int, inputs: int, outputs: int, *rows: int) -> list[jax.Array]:
    """base, x, a, b."""
    rng = np.random.default_rng(inputs)
    shapes = ((*rows, outputs), (*rows, inputs), (layers, rank, inputs), (layers, outputs, rank))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def in_float64(base, x, a, b, layer, scaling):
    base, x, a, b = (np.asarray(each, np.float64) for each in (base, x, a[layer], b[layer]))
    return base + scaling * (x @ a.T) @ b.T


@pytest.mark.parametrize(
    ("sizes", "layer"),
    [
        ((3, 3, 37, 29, 1, 1), 2),
        ((2, 16, 576, 960, 2, 4), 1),
        ((1, 1, 5, 3, 7), 0),
        ((2, 23, 1536, 577, 5), 0),
        ((1, 64, 129, 3001, 3, 1), 0),
    ],
)
def test_the_sum_is_that_of_float64(sizes, layer):
    each = arrays(*sizes)
    expected = in_float64(*each, layer, 0.7)
    found = cpu.add_low_rank(*each, jnp.int32(layer), 0.7)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_shapes_and_layers_that_do_not_fit_are_refused():
    base, x, a, b = arrays(2, 3, 37, 29, 4)
    for arguments, message in (
        ((base, x, a, b, 2), "layer is 2, but the adapter has 2 layers"),
        ((base, x, a, b, -1), "layer is -1"),
        ((base, x[:, 1:], a, b, 0), r"a has shape \[2, 3, 37\] and b \[2, 29, 3\], expected \[layers, rank, 36\]"),
        ((base, x, a, b[:, :, :2], 0), r"b \[2, 29, 2\]"),
        ((base, x, a[:1], b, 0), r"a has shape \[1, 3, 37\]"),
        ((base[:3], x, a, b, 0), "they may differ in the last size only"),
    ):
        with pytest.raises(Exception, match=f"phi3_low_rank: .*{message}"):
            jax.block_until_ready(cpu.add_low_rank(*arguments[:4], jnp.int32(arguments[4]), 1.0))


@pytest.mark.parametrize("with_gain", [False, True])
def test_few_rows_and_many_over_packed_weights_are_the_same_sum(with_gain):
    """The kernel's and XLA's; with its derivatives, which are XLA's."""
    _, x, a, b = arrays(3, 5, 37, 29, 2, 9)
    rng = np.random.default_rng(1)
    base = pack({"layers": {"x": jnp.asarray(rng.normal(size=(3, 29, 37)), jnp.float32)}})["layers"]["x"]
    gain = jnp.asarray(rng.uniform(0.5, 2, (3, 29)), jnp.float32) if with_gain else None
    tensor, layer = LoraTensor(base, a, b, gain, None, 0.7, 0.0), jnp.int32(1)
    many = linear(x, tensor, layer)
    few = jnp.stack([linear(x[:, i : i + 1], tensor, layer)[:, 0] for i in range(9)], 1)
    np.testing.assert_allclose(few, many, atol=2e-5)
    expected = in_float64(linear(x, base, layer), x, a, b, 1, 0.7)
    np.testing.assert_allclose(few, expected if gain is None else gain[1] * expected, atol=2e-5)
    assert "phi3_low_rank" in str(jax.make_jaxpr(lambda x: linear(x[:, :1], tensor, layer))(x))
    d_x = jax.grad(lambda x: linear(x, tensor, layer)[..., 0].sum())(x[:, :1])
    row = np.asarray(xla.dense(base, layer, jnp.float32), np.float64)[0] + 0.7 * np.asarray(b[1, 0] @ a[1], np.float64)
    np.testing.assert_allclose(d_x[0, 0], row * (1 if gain is None else gain[1, 0]), atol=2e-2)

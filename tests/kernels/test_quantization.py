"""What a weight can become, and what the integers mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import Checkpoint, Phi3Config
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear.quantized import GROUPS, ZERO
from phi3_jax.model import parameter_shapes
from phi3_jax.quantization import Format, formats, parse_format

pytestmark = pytest.mark.usefixtures("quick_compilation")

MATRICES = [f"layers/{name}/weight" for name in ("self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj")]
QKV, EMBEDDING, HEAD = "layers/self_attn/qkv_proj/weight", "embed_tokens/weight", "lm_head/weight"
NORMS = ["norm/weight", "layers/input_layernorm/weight", "layers/post_attention_layernorm/weight"]


def random_tensor(shape: tuple[int, ...], form: Format, seed: int = 0) -> tuple[QuantizedTensor, np.ndarray]:
    """Random integers, scales and mins for a weight of this shape, and the weight computed one by one, in float64."""
    rng = np.random.default_rng(seed)
    *outputs, columns = shape
    groups = -(-columns // form.group)
    q = rng.integers(1 if form.bits == 8 else 0, 2**form.bits, (*outputs, groups * form.group)).astype(np.uint8)
    scales = rng.normal(size=(*outputs, groups)).astype(np.float16)
    mins = None if form.symmetric else rng.normal(size=(*outputs, groups)).astype(np.float16)
    weight = np.zeros(shape)
    for place in np.ndindex(*shape):
        group = (*place[:-1], place[-1] // form.group)
        number, scale = float(q[place]), float(scales[group])
        weight[place] = (number - ZERO[form.bits]) * scale if mins is None else number * scale + float(mins[group])
    values = q if form.bits == 8 else q[..., 0::2] + 16 * q[..., 1::2]
    leaves = (jnp.asarray(values), jnp.asarray(scales), None if mins is None else jnp.asarray(mins))
    return QuantizedTensor(*leaves, form.bits, columns), weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_integers_mean_what_is_written_down(bits: int, group: int, symmetric: bool) -> None:
    tensor, weight = random_tensor((3, 131), Format(bits, group, symmetric))
    assert tensor.shape == (3, 131)
    assert tensor.group == group
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6, atol=1e-5)
    groups = -(-131 // group)
    assert tensor.nbytes == 3 * groups * (group * bits // 8 + (2 if symmetric else 4))


def test_a_layer_and_rows_of_it_are_those_of_the_whole() -> None:
    tensor, weight = random_tensor((3, 5, 37), Format(4, symmetric=False))
    layer = jax.jit(lambda tensor, index: tensor.layer(index))(tensor, 2)
    assert layer.shape == (5, 37)
    np.testing.assert_allclose(layer.dequantize(), weight[2], rtol=1e-6, atol=1e-5)
    rows = np.asarray(layer.rows(jnp.asarray([[4, 0], [-1, 5]])))
    np.testing.assert_allclose(rows[0], weight[2][[4, 0]], rtol=1e-6, atol=1e-5)
    assert np.isnan(rows[1]).all()


def test_dtype_of_the_floats() -> None:
    tensor, weight = random_tensor((2, 32), Format(8))
    assert tensor.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(tensor.dequantize(jnp.bfloat16), np.float32), weight, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "form", "bits"),
    [
        ("int8", Format(8, 32, True), 8.5),
        ("int4", Format(4, 32, True), 4.5),
        ("int4-g64", Format(4, 64, True), 4.25),
        ("int4-g128-asymmetric", Format(4, 128, False), 4.25),
        ("int8-asymmetric", Format(8, 32, False), 9),
    ],
)
def test_names_of_formats(name: str, form: Format, bits: float) -> None:
    assert parse_format(name) == form
    assert parse_format(str(form)) == form
    assert form.bits_per_weight == bits
    tensor, _ = random_tensor((2, 256), form)
    assert 8 * tensor.nbytes / (2 * 256) == bits


@pytest.mark.parametrize("name", ["int5", "int4-g16", "int4-g64-symmetric", "int4-asymmetric-g64", "int4 ", "", "INT4"])
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no quantisation .*int4-g64-asymmetric"):
        parse_format(name)
    with pytest.raises(ValueError, match="int4-mixed"):
        formats(name, [EMBEDDING])


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 48), (8, 0)])
def test_formats_that_there_are_not(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match=rf"not {bits} bits, {group}"):
        Format(bits, group)


@pytest.mark.parametrize(
    ("policy", "usual", "head", "qkv"),
    [
        ("int8", Format(8), Format(8), Format(8)),
        ("int4", Format(4), Format(4), Format(4)),
        ("int4-g64-asymmetric", Format(4, 64, False), Format(4, 64, False), Format(4, 64, False)),
        ("int4-mixed", Format(4), Format(8), Format(8)),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_policies(tiny: Checkpoint, policy: str, usual: Format, head: Format, qkv: Format, tied: bool) -> None:
    config: Phi3Config = tiny.config
    if tied:
        config = Phi3Config(**{**vars(config), "tie_word_embeddings": True})
    found = formats(policy, parameter_shapes(config))
    expected = {**dict.fromkeys(MATRICES, usual), QKV: qkv, **dict.fromkeys(NORMS)}
    expected |= {EMBEDDING: head} if tied else {EMBEDDING: Format(8), HEAD: head}
    assert found == expected

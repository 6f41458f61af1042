"""Floats become the nearest that integers can mean."""

import itertools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear.quantized import LARGEST, SMALLEST, ZERO
from phi3_jax.quantization import Format, formats, quantize, quantize_params, rounding

FORMS = [
    Format(4),
    Format(4, 64),
    Format(4, 32, symmetric=False),
    Format(8),
    Format(8, 64, symmetric=False),
]
pytestmark = pytest.mark.usefixtures("quick_compilation")


OUTPUTS, INPUTS = SHAPE = 23, 149  # of nearly all weights here: every other shape needs programs of its own


def random_weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def groups_of(weight: np.ndarray, group: int) -> list[np.ndarray]:
    """The groups of a matrix, the last of a row perhaps shorter, in float64."""
    return [row[i : i + group].astype(np.float64) for row in weight for i in range(0, weight.shape[1], group)]


def error_of(x: np.ndarray, scale: float, minimum: float, form: Format, importance: np.ndarray) -> float:
    """The least squared error of a group with this scale and min."""
    zero = ZERO[form.bits] if form.symmetric else 0
    numbers = (np.arange(SMALLEST[form.bits], LARGEST[form.bits] + 1) - zero) * scale + minimum
    return float((importance * (np.abs(x[:, None] - numbers).min(1) ** 2)).sum())


def half(x: Any) -> Any:
    return np.asarray(x, np.float16).astype(np.float64)


def by_the_largest(x: np.ndarray, form: Format, importance: np.ndarray) -> float:
    """The error of the plain way: the scale that just holds all weights."""
    if form.symmetric:
        largest = x[np.abs(x).argmax()]
        scales = [-largest / 8] if form.bits == 4 else [largest / 127]
        return error_of(x, half(scales[0]), 0, form, importance)
    scale = half((x.max() - x.min()) / (LARGEST[form.bits] - SMALLEST[form.bits]))
    return error_of(x, scale, half(x.min() - SMALLEST[form.bits] * scale), form, importance)


def by_brute_force(x: np.ndarray, form: Format) -> float:
    """The error of the best of very many scales (and mins)."""
    ones, largest = np.ones_like(x), np.abs(x).max()
    if form.symmetric:
        tried = half(largest / np.linspace(5, 12, 700))
        return min(error_of(x, sign * scale, 0, form, ones) for scale in tried for sign in (1, -1))
    low, width = x.min(), x.max() - x.min()
    pairs = itertools.product(np.linspace(-0.05, 0.25, 40), repeat=2)
    return min(error_of(x, half((1 - u - v) * width / 15), half(low + u * width), form, ones) for u, v in pairs)


def errors_of(tensor: QuantizedTensor, weight: np.ndarray, importance: np.ndarray) -> list[float]:
    misses = importance * (np.asarray(tensor.dequantize(), np.float64) - weight) ** 2
    return [float(group.sum()) for group in groups_of(misses, tensor.group)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_below_that_of_the_largest_weights_scale(form: Format, weighted: bool) -> None:
    weight = random_weight()
    importance = np.random.default_rng(1).uniform(0.1, 5, INPUTS) if weighted else np.ones(INPUTS)
    tensor = quantize(weight, form, importance if weighted else None)
    assert (tensor.shape, tensor.group, tensor.bits) == (weight.shape, form.group, form.bits)
    found = errors_of(tensor, weight, importance)
    costs = groups_of(np.broadcast_to(importance, weight.shape), form.group)
    plain = [by_the_largest(x, form, cost) for x, cost in zip(groups_of(weight, form.group), costs, strict=True)]
    # Of 8 bits and offsets, float16 loses more than the search wins, in some groups.
    most = 1.2 if form == Format(8, 64, symmetric=False) else 1.001
    assert all(ours <= theirs * most for ours, theirs in zip(found, plain, strict=True))
    assert sum(found) < (0.93 if form.bits == 4 else 0.995) * sum(plain)


@pytest.mark.parametrize("form", [Format(4), Format(4, 32, symmetric=False)], ids=str)
def test_the_error_is_close_to_the_least_that_there_is(form: Format) -> None:
    weight = random_weight(2)
    found = errors_of(quantize(weight, form), weight, np.ones(INPUTS))[:12]
    least = [by_brute_force(x, form) for x in groups_of(weight, form.group)[:12]]
    assert sum(found) <= sum(least) * 1.04
    assert all(ours <= theirs * 1.35 for ours, theirs in zip(found, least, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_weight_has_the_nearest_integer(form: Format) -> None:
    weight = random_weight(3)
    tensor = quantize(weight, form)
    for x, ours, scale, minimum in zip(
        groups_of(weight, form.group),
        errors_of(tensor, weight, np.ones(INPUTS)),
        np.asarray(tensor.scales, np.float64).ravel(),
        np.zeros(tensor.scales.size) if tensor.mins is None else np.asarray(tensor.mins, np.float64).ravel(),
        strict=True,
    ):
        assert ours == pytest.approx(error_of(x, scale, minimum, form, np.ones_like(x)), rel=1e-3)


def test_eight_bits_keep_within_their_integers() -> None:
    for form in (Format(8), Format(8, 64, symmetric=False)):
        assert np.asarray(quantize(random_weight(), form).values).min() >= 1


@pytest.mark.parametrize("form", [Format(4), Format(8), Format(4, 32, symmetric=False)], ids=str)
def test_what_lies_on_a_grid_is_kept(form: Format) -> None:
    rng = np.random.default_rng(4)
    q = rng.integers(SMALLEST[form.bits], LARGEST[form.bits] + 1, (OUTPUTS, 5, 32))
    q[..., 0], q[..., 1] = SMALLEST[form.bits], LARGEST[form.bits]
    scale = rng.uniform(0.1, 2, (OUTPUTS, 5, 1)).astype(np.float16).astype(np.float32)
    weight = ((q - ZERO[form.bits]) * scale).astype(np.float32).reshape(OUTPUTS, -1)[:, :INPUTS]
    atol = 0 if form.symmetric else 0.02
    np.testing.assert_allclose(quantize(weight, form).dequantize(), weight, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_zeros_constants_and_single_weights(form: Format) -> None:
    weight = np.zeros(SHAPE, np.float32)
    weight[1, 3], weight[2], weight[3, 32:] = -3.0, 0.7, 1e-3
    found = np.asarray(quantize(weight, form).dequantize())
    np.testing.assert_allclose(found, weight, atol=1e-3, rtol=2e-3)
    assert not found[[0, *range(4, OUTPUTS)]].any()


def test_a_stack_is_its_layers_and_any_dtype_its_floats() -> None:
    stack = np.stack([random_weight(i) for i in range(3)]).astype(ml_dtypes.bfloat16)
    together = quantize(stack, Format(4))
    assert together.shape == (3, *SHAPE)
    for i in range(3):
        alone = quantize(jnp.asarray(stack[i]).astype(jnp.float32), Format(4))
        assert jax.tree.all(jax.tree.map(lambda a, b, i=i: bool((a[i] == b).all()), together, alone))


@pytest.mark.parametrize("rows", [20, 21])
def test_a_large_matrix_in_blocks_is_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight()
    whole = quantize(weight, Format(4))
    monkeypatch.setattr(rounding, "_BLOCK", 7 * INPUTS)
    parts = quantize(weight[:rows], Format(4))
    assert parts.shape == (rows, INPUTS)
    np.testing.assert_array_equal(whole.values[:rows], parts.values)
    np.testing.assert_array_equal(whole.scales[:rows], parts.scales)


@pytest.mark.parametrize("form", [Format(4), Format(8, 64, symmetric=False)], ids=str)
def test_weights_that_cannot_be_rounded(form: Format) -> None:
    good = random_weight()
    for bad in (np.nan, np.inf, -np.inf):
        weight = good.copy()
        weight[1, 38] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, form)
    with pytest.raises(ValueError, match=r"too large for scales in float16"):
        quantize(good * 1e8, form)
    with pytest.raises(ValueError, match=r"of which .* is the largest, are too small for scales in float16"):
        quantize(good * 1e-8, form)


def test_small_weights_beside_others_become_the_nearest() -> None:
    weight = random_weight()
    weight[1] *= 1e-9
    assert np.abs(np.asarray(quantize(weight, Format(4)).dequantize())[1]).max() < 1e-6


def a_tree() -> dict[str, Any]:
    """What a tree of parameters has, in shapes that need no more programs."""
    down = jnp.asarray(np.stack([random_weight(5), random_weight(6)]))
    return {
        "embed_tokens/weight": jnp.asarray(random_weight(7)),
        "layers/mlp/down_proj/weight": down,
        "layers/input_layernorm/weight": jnp.ones((2, INPUTS)),
        "lm_head/weight": jnp.asarray(random_weight(8)),
    }


def test_a_whole_model() -> None:
    seen: list[tuple[int, int]] = []
    before = a_tree()
    params = flax.traverse_util.unflatten_dict(before, sep="/")
    rounded = quantize_params(params, "int4-mixed", lambda done, total: seen.append((done, total)))
    after = flax.traverse_util.flatten_dict(rounded, sep="/")
    assert after.keys() == before.keys()
    for path, form in formats("int4-mixed", before).items():
        if form is None:
            assert after[path] is before[path]
        else:
            assert (after[path].bits, after[path].shape) == (form.bits, before[path].shape)
            np.testing.assert_allclose(after[path].dequantize(), before[path], atol=0.02 if form.bits == 8 else 0.35)
    total = sum(leaf.size for leaf in before.values())
    assert seen[-1] == (total, total)
    assert len(seen) == len(before)


def test_the_message_names_the_tensor() -> None:
    leaves = a_tree()
    leaves["layers/mlp/down_proj/weight"] = leaves["layers/mlp/down_proj/weight"].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layers/mlp/down_proj/weight: there are weights that are not finite"):
        quantize_params(flax.traverse_util.unflatten_dict(leaves, sep="/"), "int4-mixed")

"""Rounding by a text: each matrix for the inputs that it really has."""

import dataclasses
import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax import Checkpoint, Phi3, Phi3Config
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear.quantized import LARGEST, SMALLEST, ZERO
from phi3_jax.model.decoder import rms_norm
from phi3_jax.model.points import Hooks
from phi3_jax.quantization import Format, calibrate, calibration, formats, gptq, quantize, quantize_params

pytestmark = pytest.mark.usefixtures("quick_compilation")
OUTPUTS, INPUTS = 23, 149  # inputs fill neither groups nor a block
DAMPING = 0.01


def correlated(seed: int = 0, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A weight [O, I], and the sum of x x^T [I, I] of inputs in which few things happen at a time."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 20)) @ rng.normal(size=(20, INPUTS)) + 0.3 * rng.normal(size=(count, INPUTS))
    return rng.normal(size=(OUTPUTS, INPUTS)).astype(np.float32), (x.T @ x).astype(np.float32)


def damped(hessian: np.ndarray) -> np.ndarray:
    return hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))


def output_error(tensor: QuantizedTensor, weight: np.ndarray, hessian: np.ndarray) -> float:
    miss = np.asarray(tensor.dequantize(), np.float64) - weight.astype(np.float64)
    return float(np.einsum("oi,ij,oj->", miss, hessian, miss))


def one_by_one(weight: np.ndarray, hessian: np.ndarray, tensor: QuantizedTensor) -> np.ndarray:
    """GPTQ as it is derived, in float64, with the scales of `tensor`: the inverse of what is left, after each input."""
    w, inverse = weight.astype(np.float64), np.linalg.inv(damped(hessian.astype(np.float64)))
    scales = np.asarray(tensor.scales, np.float64)
    zero = ZERO[tensor.bits] if tensor.mins is None else 0
    mins = np.zeros_like(scales) if tensor.mins is None else np.asarray(tensor.mins, np.float64)
    result = np.zeros_like(w)
    for i in range(w.shape[1]):
        scale, minimum = scales[:, i // tensor.group], mins[:, i // tensor.group]
        q = np.clip(np.round((w[:, i] - minimum) / scale) + zero, SMALLEST[tensor.bits], LARGEST[tensor.bits])
        result[:, i] = (q - zero) * scale + minimum
        w -= np.outer((w[:, i] - result[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # so that nothing is divided by zero; the input is done
    return result


@pytest.mark.parametrize("form", [Format(4), Format(4, 64, symmetric=False), Format(8)], ids=str)
def test_one_matrix_is_rounded_as_the_derivation_says(form: Format) -> None:
    weight, hessian = correlated()
    tensor = gptq.gptq(jnp.asarray(weight), jnp.asarray(hessian), form)
    found, expected = np.asarray(tensor.dequantize(), np.float64), one_by_one(weight, hessian, tensor)
    # A tie that float32 decides otherwise changes all that follows in its row: then the row is as good, not equal.
    same = np.isclose(found, expected, rtol=1e-3, atol=1e-3).all(1)
    assert same.mean() > 0.6
    assert np.isclose(found, expected, rtol=1e-3, atol=1e-3).mean() > 0.85


@pytest.mark.parametrize("form", [Format(4), Format(4, 64, symmetric=False), Format(8)], ids=str)
def test_outputs_change_less_than_by_plain_rounding(form: Format) -> None:
    weight, hessian = correlated(1)
    calibrated = gptq.gptq(jnp.asarray(weight), jnp.asarray(hessian), form)
    assert (calibrated.shape, calibrated.group, calibrated.bits) == (weight.shape, form.group, form.bits)
    plain = quantize(weight, form)
    assert jax.tree.map(jnp.shape, calibrated) == jax.tree.map(jnp.shape, plain)
    assert output_error(calibrated, weight, hessian) < 0.3 * output_error(plain, weight, hessian)


def test_scales_are_searched_for_where_errors_cost_the_most() -> None:
    weight, hessian = correlated(2)
    tensor = gptq.gptq(jnp.asarray(weight), jnp.asarray(hessian), Format(4))
    # What an input's error costs once those before it are rounded: the inverse's first entry, of what is left, tells.
    costs = [1 / np.linalg.inv(damped(hessian.astype(np.float64))[i:, i:])[0, 0] for i in range(32)]
    first = quantize(weight[:, :32], Format(4), np.asarray(costs))
    assert (np.asarray(tensor.scales)[:, 0] == np.asarray(first.scales)[:, 0]).mean() > 0.9


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_inputs_that_have_nothing_in_common_are_rounded_plainly(scale: float) -> None:
    weight = correlated()[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    tensor = gptq.gptq(jnp.asarray(weight, jnp.bfloat16), scale * jnp.eye(INPUTS), Format(4))
    np.testing.assert_allclose(tensor.dequantize(), quantize(weight, Format(4)).dequantize(), atol=1e-5)


def test_what_cannot_be_rounded() -> None:
    weight, hessian = (jnp.asarray(each) for each in correlated())
    with pytest.raises(ValueError, match="inputs that are not finite"):
        gptq.gptq(weight, hessian.at[3, 4].set(jnp.nan), Format(4))
    with pytest.raises(ValueError, match="too alike for float32"):
        gptq.gptq(weight, hessian.at[3, 3].set(-1e9), Format(4))
    with pytest.raises(ValueError, match="weights that are not finite"):
        gptq.gptq(weight.at[3, 4].set(jnp.inf), hessian, Format(4))
    with pytest.raises(ValueError, match="too large for scales in float16"):
        gptq.gptq(weight * 1e7, hessian, Format(4))


def dequantized(params: Any) -> Any:
    def is_integers(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor)

    return jax.tree.map(lambda leaf: leaf.dequantize() if is_integers(leaf) else leaf, params, is_leaf=is_integers)


def text() -> jax.Array:
    """Tokens [9, 23]: past the window, and past where LongRoPE's factors change. Few are used, as in a real text."""
    return 13 * jax.random.randint(jax.random.key(0), (9, 23), 0, 7)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: Phi3Config, params: Any, tokens: jax.Array) -> jax.Array:
    """The residual stream [L+1, B, T, D]."""
    _, captured = Phi3(config).apply({"params": params}, tokens, hooks=Hooks(("resid_pre", "resid_post")))
    return jnp.concatenate([captured["resid_pre"][:1], captured["resid_post"]])


def test_the_walk_is_the_models(tiny: Checkpoint) -> None:
    tokens = text()
    expected = hidden(tiny.config, tiny.params, tokens)
    leaves = flax.traverse_util.flatten_dict(tiny.params, sep="/")
    for number in range(tiny.config.num_hidden_layers):
        layer = {path: leaf[number] for path, leaf in leaves.items() if path.startswith("layers/")}
        # What is given may be used up.
        found = calibration._after(tiny.config, layer, jnp.array(expected[number]))
        np.testing.assert_allclose(found, expected[number + 1], atol=1e-4)


@pytest.fixture(scope="module")
def calibrated(tiny: Checkpoint) -> tuple[Any, list[tuple[int, int]]]:
    jax.config.update("jax_disable_most_optimizations", True)
    seen: list[tuple[int, int]] = []
    tokens = text()
    result = calibrate(tiny.config, tiny.params, tokens, "int4", lambda done, total: seen.append((done, total)))
    return result, seen


def test_leaves_are_what_the_policy_says(tiny: Checkpoint, calibrated: tuple[Any, list[tuple[int, int]]]) -> None:
    result, seen = calibrated
    before = flax.traverse_util.flatten_dict(tiny.params, sep="/")
    after = flax.traverse_util.flatten_dict(result, sep="/")
    planned = formats("int4", before)
    assert after.keys() == before.keys()
    for path, form in planned.items():
        if form is None:
            np.testing.assert_array_equal(after[path], before[path])
        else:
            leaf = after[path]
            assert (leaf.shape, leaf.bits, leaf.group) == (before[path].shape, form.bits, form.group)
    total = sum(before[path].size for path, form in planned.items() if form)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_each_matrix_is_rounded_for_what_rounded_layers_give(
    tiny: Checkpoint, calibrated: tuple[Any, list[tuple[int, int]]]
) -> None:
    tokens, eps = text(), tiny.config.rms_norm_eps
    stream = hidden(tiny.config, dequantized(calibrated[0]), tokens)
    layers = tiny.params["layers"]
    for number in (0, 2):
        x = rms_norm(stream[number], layers["input_layernorm"]["weight"][number], eps)
        weight = layers["self_attn"]["qkv_proj"]["weight"][number]
        expected = gptq.gptq(weight, jnp.einsum("BTI,BTJ->IJ", x, x), Format(4))
        found = calibrated[0]["layers"]["self_attn"]["qkv_proj"]["weight"].layer(number)
        assert np.isclose(found.dequantize(), expected.dequantize(), atol=1e-3).mean() > 0.97
    x = rms_norm(stream[-1], tiny.params["norm"]["weight"], eps)
    expected = gptq.gptq(tiny.params["lm_head"]["weight"], jnp.einsum("BTI,BTJ->IJ", x, x), Format(4))
    found = calibrated[0]["lm_head"]["weight"]
    assert np.isclose(found.dequantize(), expected.dequantize(), atol=1e-3).mean() > 0.97


def test_the_model_is_nearer_than_by_plain_rounding(
    tiny: Checkpoint, calibrated: tuple[Any, list[tuple[int, int]]]
) -> None:
    tokens = text()
    exact = hidden(tiny.config, tiny.params, tokens)[-1]

    def miss(params: Any) -> float:
        return float(((hidden(tiny.config, dequantized(params), tokens)[-1] - exact) ** 2).mean())

    def plain(path: Any, leaf: jax.Array) -> jax.Array:
        """Rounded to 15 steps of its own for each row of some tens of weights."""
        if "norm" in jax.tree_util.keystr(path):
            return leaf
        step = np.abs(leaf).max(-1, keepdims=True) / 7
        return jnp.asarray(np.round(leaf / step) * step)

    # The rows have no more than 48 weights.
    assert miss(calibrated[0]) < 0.6 * miss(jax.tree_util.tree_map_with_path(plain, tiny.params))


def test_a_table_that_is_the_head_too_is_rounded_plainly(tiny: Checkpoint) -> None:
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True, num_hidden_layers=1)
    tied = {"embed_tokens": tiny.params["embed_tokens"], "norm": tiny.params["norm"], "layers": tiny.params["layers"]}
    result = calibrate(config, tied, text(), "int4")
    assert result.keys() == tied.keys()
    plain = quantize(tied["embed_tokens"]["weight"], Format(4))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result["embed_tokens"]["weight"], plain))
    # The first layer is rounded for rows that are.
    x = rms_norm(plain.rows(text()), tied["layers"]["input_layernorm"]["weight"][0], config.rms_norm_eps)
    weight = tied["layers"]["self_attn"]["qkv_proj"]["weight"][0]
    expected = gptq.gptq(weight, jnp.einsum("BTI,BTJ->IJ", x, x), Format(4))
    found = result["layers"]["self_attn"]["qkv_proj"]["weight"].layer(0)
    assert np.isclose(found.dequantize(), expected.dequantize(), atol=1e-3).mean() > 0.97


def test_texts_that_are_none(tiny: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"integers of shape \[B, T\], not int32 \(23,\)"):
        calibrate(tiny.config, tiny.params, text()[0], "int4")
    with pytest.raises(ValueError, match=r"integers of shape \[B, T\], not float32"):
        calibrate(tiny.config, tiny.params, jnp.ones((2, 3)), "int4")
    with pytest.raises(ValueError, match="ids from 1 to 97; vocab_size=97"):
        calibrate(tiny.config, tiny.params, jnp.asarray([[1, 97]]), "int4")
    with pytest.raises(ValueError, match="no quantisation 'int3'"):
        calibrate(tiny.config, tiny.params, text(), "int3")


def test_integers_are_not_rounded_again(tiny: Checkpoint, calibrated: tuple[Any, list[tuple[int, int]]]) -> None:
    for again in (
        lambda: calibrate(tiny.config, calibrated[0], text(), "int8"),
        lambda: quantize_params(calibrated[0], "int8"),
    ):
        with pytest.raises(
            ValueError, match="embed_tokens/weight is a QuantizedTensor already: load the model as floats"
        ):
            again()


def test_the_message_names_the_matrix(tiny: Checkpoint) -> None:
    leaves = flax.traverse_util.flatten_dict(tiny.params, sep="/")
    leaves["layers/self_attn/qkv_proj/weight"] = leaves["layers/self_attn/qkv_proj/weight"].at[0, 1, 2].set(jnp.inf)
    with pytest.raises(ValueError, match=r"layers/self_attn/qkv_proj/weight: there are weights that are not finite"):
        calibrate(tiny.config, flax.traverse_util.unflatten_dict(leaves, sep="/"), text(), "int4")

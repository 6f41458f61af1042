"""Integers by columns, and the TPU kernel that multiplies them, interpreted on the CPU, against the reference."""

from __future__ import annotations

import filecmp
import functools
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.kernels import QuantizedTensor, status
from phi3_jax.kernels.linear import linear, tpu, xla
from phi3_jax.quantization import Format, quantize

FORMS = [Format(8, 32, True), Format(4, 64, True), Format(4, 32, False), Format(8, 128, False)]
pytestmark = pytest.mark.usefixtures("quick_compilation")


def stack(form: Format, outputs: int = 200, inputs: int = 300) -> QuantizedTensor:
    """Two layers [O, I] by rows; some scales are small ones, some negative."""
    weights = np.random.default_rng(0).normal(size=(2, outputs, inputs)) * 0.05
    weights[:, 7] *= 1e-3  # float16's subnormal numbers
    layers = [quantize(jnp.asarray(each, jnp.float32), form) for each in weights]
    return jax.tree.map(lambda *each: jnp.stack(each), *layers)


@functools.partial(jax.jit, static_argnames="dtype")
def product(x: jax.Array, weight: QuantizedTensor, layer: jax.Array | None, dtype: Any) -> jax.Array:
    return tpu.linear(x, weight, layer, dtype, interpret=True)


@pytest.mark.parametrize(
    "form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])], ids=str
)
def test_the_same_weight_by_columns(form: Format) -> None:
    rows = stack(form)
    for weight in (rows, jax.tree.map(np.asarray, rows)):
        columns = weight.by_columns()
        assert columns.by_column
        assert columns.values.shape == (2, -(-300 // form.group) * form.group, 256)
        assert columns.values.dtype == (jnp.int8 if form.bits == 8 else jnp.int4)
        assert (columns.shape, columns.group, columns.dtype) == (rows.shape, rows.group, rows.dtype)
        np.testing.assert_array_equal(columns.dequantize(), rows.dequantize())
        for back, original in zip(jax.tree.leaves(columns.by_rows()), jax.tree.leaves(rows), strict=True):
            assert isinstance(back, type(jax.tree.leaves(weight)[0]))
            np.testing.assert_array_equal(back, original, strict=True)
    one, ids = (each.layer(jnp.int32(1)) for each in (rows, columns)), jnp.asarray([[0, 199], [200, -1]])
    expected, found = (each.rows(ids) for each in one)
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(found).all(axis=-1).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of outputs, the last of which is not full, and several pieces of inputs."""
    monkeypatch.setattr(tpu, "_WEIGHTS", 1)
    monkeypatch.setattr(tpu, "_STEP", 128)
    weight = stack(form)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 300)), jnp.float32)
    got = product(x, weight.by_columns(), jnp.int32(1), None)
    expected = xla.linear(x, weight, jnp.int32(1), None)
    np.testing.assert_allclose(got, expected, atol=5e-6)
    np.testing.assert_allclose(got[..., 7], expected[..., 7], rtol=1e-3, atol=1e-8)  # the small scales


def test_products_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of rows, of which the second is not full: the floats of a block of weights are made once."""
    monkeypatch.setattr(tpu, "_ROWS_BYTES", 1)
    weight = stack(FORMS[0], 130, 64).layer(jnp.int32(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(150, 64)), jnp.bfloat16)
    got = product(x, weight.by_columns(), None, jnp.float32)
    np.testing.assert_allclose(got, xla.linear(x.astype(jnp.float32), weight, None, None), atol=6e-3)


def test_one_row_of_floats() -> None:
    """Which gets a second one, and loses it again."""
    random = np.random.default_rng(2)
    x, weight = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((1, 1, 37), (2, 19, 37)))
    got = tpu.one_row(x, weight, jnp.int32(1), jnp.float32)
    assert got.shape == (1, 1, 19)
    np.testing.assert_allclose(got, xla.linear(x, weight, jnp.int32(1), None), rtol=1e-5, atol=1e-5)


def test_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the reference multiplies them; derivatives are its, too."""
    weight = stack(FORMS[1]).by_columns()
    x = jnp.ones((2, 300))
    expected = xla.linear(x, weight.by_rows(), jnp.int32(1), None)
    np.testing.assert_array_equal(linear(x, weight, jnp.int32(1)), expected)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_array_equal(linear(x, weight, jnp.int32(1)), expected)  # compiled for the CPU after all
    said = {
        by_column: status({"a": weight if by_column else weight.by_rows()})["linear"] for by_column in (True, False)
    }
    assert said[True] == "tpu kernel (Pallas)"
    assert "layout='columns'" in said[False]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, "int8-asymmetric"])
def test_checkpoints(policy: str | None, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Mapped, or quantised while loading: the same integers by columns, but for the table; saved, they are by rows."""
    path = request.getfixturevalue("int4_folder" if policy is None else "tiny_folder")
    rows, columns = (phi3_jax.load(path, quantize=policy, layout=layout) for layout in ("rows", "columns"))
    ours, theirs = (flax.traverse_util.flatten_dict(each.params, sep="/") for each in (columns, rows))
    matrices = {name for name, leaf in ours.items() if isinstance(leaf, QuantizedTensor)}
    assert {name for name in matrices if not ours[name].by_column} == {"embed_tokens/weight"}
    assert {f"layers/self_attn/{name}_proj/weight" for name in ("qkv", "o")} < matrices
    for name in matrices:
        np.testing.assert_array_equal(ours[name].dequantize(), theirs[name].dequantize())
    for model, name in ((columns, "columns"), (rows, "rows")):
        phi3_jax.save(model, tmp_path / name)
    assert filecmp.cmp(*(tmp_path / name / "phi3_jax.safetensors" for name in ("columns", "rows")), shallow=False)

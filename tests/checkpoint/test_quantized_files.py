import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.checkpoint import quantized_files
from phi3_jax.kernels.native import build

pytestmark = pytest.mark.usefixtures("quick_compilation")

needs_kernels = pytest.mark.skipif(build.why_unavailable() is not None, reason=f"no kernels: {build.why_unavailable()}")


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("policy", ["int8", "int4-g64-asymmetric", "int4-mixed"])
def test_quantised_weights_come_back_bit_for_bit(tiny_folder, tmp_path, policy):
    model = phi3_jax.load(tiny_folder, quantize=policy, layout="rows")
    phi3_jax.save(model, tmp_path / "q")
    again = phi3_jax.load(tmp_path / "q", layout="rows")
    same(again.params, model.params)
    assert again.config == model.config
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "phi3_jax"
    phi3_jax.save(again, tmp_path / "r")
    assert (tmp_path / "r" / quantized_files.FILE).read_bytes() == (tmp_path / "q" / quantized_files.FILE).read_bytes()
    with pytest.raises(ValueError, match="quantised already"):
        phi3_jax.load(tmp_path / "q", quantize="int8")


@needs_kernels
@pytest.mark.parametrize("policy", [None, "int8", "int4-asymmetric"])
def test_packed_weights_are_the_same_by_each_way(tiny_folder, tmp_path, policy):
    dtype = "bfloat16" if policy is None else "float32"
    packed = phi3_jax.load(tiny_folder, dtype, quantize=policy, layout="packed")
    phi3_jax.save(packed, tmp_path / "packed")
    # Packed floats are written as any others are.
    assert (tmp_path / "packed" / "model.safetensors").exists() == (policy is None)
    again = phi3_jax.load(tmp_path / "packed", "auto" if policy else dtype)
    same(again.params, packed.params)
    if policy is not None:
        phi3_jax.save(phi3_jax.load(tiny_folder, dtype, quantize=policy, layout="rows"), tmp_path / "rows")
        same(phi3_jax.load(tmp_path / "rows", layout="packed").params, packed.params)


@needs_kernels
def test_floats_that_the_kernels_do_not_read_are_not_rounded_by_packing(tiny_folder):
    same(phi3_jax.load(tiny_folder, layout="packed").params, phi3_jax.load(tiny_folder, layout="rows").params)


@needs_kernels
def test_mapped_weights_are_not_copied(tiny_folder, tmp_path):
    phi3_jax.save(phi3_jax.load(tiny_folder, quantize="int4", layout="packed"), tmp_path / "q")
    tree = phi3_jax.load(tmp_path / "q").params["layers"]["mlp"]["down_proj"]["weight"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split() for line in maps if line.rstrip().endswith(quantized_files.FILE)]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
    for leaf in (tree.data, tree.scales):
        assert any(begin <= leaf.unsafe_buffer_pointer() < end for begin, end in spans)


def test_what_does_not_fit_the_description_is_refused(tiny_folder, tmp_path):
    phi3_jax.save(phi3_jax.load(tiny_folder, quantize="int4", layout="rows"), tmp_path / "q")
    config = tmp_path / "q" / "config.json"
    settings = json.loads(config.read_text())
    leaves = settings["quantization_config"]["leaves"]

    def refused(match, **changes):
        changed = dict(leaves) | changes
        config.write_text(
            json.dumps(settings | {"quantization_config": {"quant_method": "phi3_jax", "leaves": changed}})
        )
        with pytest.raises(ValueError, match=match):
            phi3_jax.load(tmp_path / "q")

    down = leaves["layers/mlp/down_proj/weight"]
    refused("which is unknown", **{"layers/mlp/down_proj/weight": down | {"group": 31}})
    refused("which is unknown", **{"layers/mlp/down_proj/weight": down | {"kind": "int3"}})
    refused("down_proj/weight.values is not uint8", **{"layers/mlp/down_proj/weight": down | {"kind": "int8"}})
    for odd in (None, [], "int4", 4, {}, {"kind": ["int4"]}, down | {"group": "32"}, down | {"group": 32.0}):
        refused(
            r"describes layers/mlp/down_proj/weight as .*, which is unknown", **{"layers/mlp/down_proj/weight": odd}
        )
    for odd in ({"symmetric": "no"}, {"packed": 1}, {"kind": None}, {"kind": "float16", "packed": True}):
        refused("which is unknown", **{"layers/mlp/down_proj/weight": down | odd})
    refused("describes norm/weight as .*, which is unknown", **{"norm/weight": down})  # a vector
    refused("does not describe", extra=down)
    (tmp_path / "q" / quantized_files.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="phi3-quantize"):
        phi3_jax.load(tmp_path / "q")


@pytest.mark.slow
def test_a_quantised_model_answers_like_the_floats_it_stands_for(tiny_folder):
    model = phi3_jax.load(tiny_folder, quantize="int8", layout="rows")
    floats = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, phi3_jax.quantization.QuantizedTensor) else leaf,
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, phi3_jax.quantization.QuantizedTensor),
    )
    prompts = [[5, 6, 7, 8], [9, 10]]
    options = phi3_jax.infer.Options(cache_dtype="float32")
    one, other = (
        phi3_jax.infer.generate(dataclasses.replace(model, params=p), prompts, max_new_tokens=9, options=options)
        for p in (model.params, floats)
    )
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]

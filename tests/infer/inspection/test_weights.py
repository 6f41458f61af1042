"""The table of weights: against NumPy, against counts written down anew, and for weights of every kind."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.adapters import LoraConfig, attach, init_adapter
from phi3_jax.checkpoint import stored_tensors
from phi3_jax.infer.inspection import summary, weigh, weigh_shapes
from phi3_jax.infer.inspection.sizes import parts
from phi3_jax.kernels import why_unavailable
from phi3_jax.kernels.linear.per_layer import split_layers

OPTIONS = {"name": "some model", "context": 30, "cache_dtype": "float32"}


def of(table, name):
    (row,) = [row for row in table["parameters"] if row["name"] == name]
    return row


def norms(stack):
    return np.sqrt((np.asarray(stack, np.float64) ** 2).reshape(len(stack), -1).sum(1))


def test_norms_bytes_and_totals(tiny):
    table = weigh(tiny.config, tiny.params, **OPTIONS)
    down = np.asarray(tiny.params["layers"]["mlp"]["down_proj"]["weight"])
    row = of(table, "layers/mlp/down_proj/weight")
    assert (row["shape"], row["count"], row["dtype"], row["bytes"]) == ([3, 24, 40], 2880, "float32", 11520)
    np.testing.assert_allclose(row["norms"], norms(down), 1e-4)
    np.testing.assert_allclose(row["norm"], np.sqrt((norms(down) ** 2).sum()), 1e-4)
    np.testing.assert_allclose(row["largest"], np.abs(down).max(), 1e-4)
    np.testing.assert_allclose(
        of(table, "embed_tokens/weight")["norm"], norms([tiny.params["embed_tokens"]["weight"]])[0], 1e-4
    )
    assert of(table, "norm/weight")["norm"] == round(math.sqrt(24), 4)  # all of them are 1
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    assert table["total"] == {"count": count, "bytes": 4 * count}
    assert table["model"]["total"] == count
    assert table["errors"] is None
    split = weigh(tiny.config, split_layers(tiny.params), **OPTIONS)
    assert split == table


def test_where_the_numbers_of_phi_3_mini_are():
    counted = {part["part"]: part["count"] for part in parts(phi3_jax.PRESETS["phi-3-mini"])}
    one_layer = 3072 * 3 * 3072 + 3072 * 3072 + 3072 * 2 * 8192 + 8192 * 3072 + 2 * 3072
    assert sum(counted.values()) == 2 * 32064 * 3072 + 32 * one_layer + 3072 == 3_821_079_552
    assert counted["MLP gate and up"] == 32 * 2 * 8192 * 3072
    for name, config in phi3_jax.PRESETS.items():
        for part in parts(config):  # each formula is what it says
            formula = part["formula"].replace("layers", "").replace("heads", "").replace("x", "*")
            assert part["count"] == (0 if "again" in formula else eval(formula)), (name, part)
    tied = parts(phi3_jax.PRESETS["phi-4-mini"])
    assert tied[-1] == {"part": "output head", "formula": "the embedding again", "count": 0}


def test_what_a_token_takes(tiny):
    """Products and sums of each matrix with one row, of scores and of weighted sums; keys and values that are seen."""
    matrices = [leaf for leaf in jax.tree.leaves(tiny.params["layers"]) if leaf.ndim == 3]
    weights = 2 * (sum(leaf.size for leaf in matrices) + 97 * 24)
    seen = 19  # of 31, by the window
    attention = 3 * 6 * seen * (2 * 8 + 2 * 8)
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    assert weigh(tiny.config, tiny.params, **OPTIONS)["token"] == {
        "context": 30,
        "weight_bytes": 4 * (count - 97 * 24),
        "cache_bytes": seen * 3 * 2 * 2 * 8 * 4,
        "flops": weights + attention,
        "flops_of_weights": weights,
        "flops_of_attention": attention,
    }
    for dtype, bytes_ in {"float32": 4 * 8, "bfloat16": 2 * 8, "int8": 8 + 4}.items():
        cache = phi3_jax.KVCache.create(tiny.config, 1, 5, dtype)
        taken = sum(x.nbytes for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None)
        table = weigh_shapes(tiny.config, name="", context=2, cache_dtype=dtype, dtype="bfloat16")
        assert table["cache"] == {"dtype": dtype, "bytes_per_token": 3 * 2 * 2 * bytes_}
        assert taken == 5 * table["cache"]["bytes_per_token"]
        assert table["token"]["cache_bytes"] == 3 * table["cache"]["bytes_per_token"]


@pytest.mark.slow
def test_sizes_alone_give_the_bytes_of_what_is_loaded(tiny, int4_folder):
    loaded = phi3_jax.load(int4_folder, layout="rows")
    table = weigh(loaded.config, loaded.params, **OPTIONS)
    sizes = weigh_shapes(loaded.config, name="some model", context=30, cache_dtype="float32", dtype="float32")
    integers = weigh_shapes(tiny.config, **OPTIONS, dtype="float32", quantize="int4")
    for ours, shapes in zip(table["parameters"], integers["parameters"], strict=True):
        same = ("name", "shape", "count", "dtype", "bytes")
        assert [ours[key] for key in same] == [shapes[key] for key in same]
        assert shapes["norm"] is None
    assert sizes["total"]["bytes"] > integers["total"]["bytes"] == table["total"]["bytes"]
    assert table["errors"].startswith("unknown: the file holds integers")
    assert {row["error"] for row in table["parameters"]} == {None}
    assert integers["errors"] is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "packed", "layers"])
def test_errors_of_integers(tiny, tiny_folder, layout):
    if layout == "packed" and why_unavailable() is not None:
        pytest.skip(why_unavailable())
    loaded = phi3_jax.load(tiny_folder, quantize="int4", layout=layout)
    floats = stored_tensors(tiny_folder)
    done = []
    table = weigh(loaded.config, loaded.params, **OPTIONS, floats=floats, on_progress=lambda *each: done.append(each))
    row = of(table, "layers/self_attn/qkv_proj/weight")
    rows = phi3_jax.load(tiny_folder, quantize="int4", layout="rows").params["layers"]["self_attn"]["qkv_proj"]
    weight = np.asarray(tiny.params["layers"]["self_attn"]["qkv_proj"]["weight"], np.float64)
    wrong = norms(np.asarray(rows["weight"].dequantize()) - weight)
    np.testing.assert_allclose(row["errors"], wrong / norms(weight), 1e-3)
    np.testing.assert_allclose(row["error"], np.sqrt((wrong**2).sum() / (weight**2).sum()), 1e-3)
    assert 0.02 < row["error"] < 0.2
    assert row["dtype"] == "int4-g32"
    assert of(table, "norm/weight")["error"] is None
    assert of(table, "embed_tokens/weight")["error"] < 0.01  # 8 bits
    assert table["errors"] == "relative to the file's weights"
    assert done[-1] == (table["total"]["count"],) * 2


@pytest.mark.slow
def test_an_adapter_counts_but_its_base_is_compared(tiny, tiny_folder):
    lora = LoraConfig(rank=2, alpha=4, targets=("o_proj",))
    adapter = jax.tree.map(lambda leaf: leaf + 0.5, init_adapter(tiny.config, lora, jax.random.key(1)))
    loaded = phi3_jax.load(tiny_folder, quantize="int8", layout="rows")
    plain = of(
        weigh(loaded.config, loaded.params, **OPTIONS, floats=stored_tensors(tiny_folder)),
        "layers/self_attn/o_proj/weight",
    )
    params = attach(loaded.params, adapter, lora)
    table = weigh(loaded.config, params, **OPTIONS, floats=stored_tensors(tiny_folder))
    row = of(table, "layers/self_attn/o_proj/weight")
    assert row["dtype"] == "int8-g32 with rank 2"
    assert table["model"]["weights"] == "int8 with an adapter"
    assert row["bytes"] - plain["bytes"] == 4 * 3 * 2 * (24 + 48)
    assert row["error"] == plain["error"]
    assert row["norm"] > 1.1 * plain["norm"]
    kept = dataclasses.replace(loaded, params=params)
    assert table["total"]["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(kept.params))


@pytest.mark.slow
def test_a_tied_head_that_an_adapter_has_parted(tiny, tmp_path, quick_compilation):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    phi3_jax.save(dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config)), tmp_path / "tied")
    loaded = phi3_jax.load(tmp_path / "tied", quantize="int8", layout="rows")
    lora = LoraConfig(rank=2, alpha=4, targets=("embed_tokens",))
    params = attach(loaded.params, init_adapter(config, lora, jax.random.key(1)), lora)
    tied, parted = (
        weigh(config, each, **OPTIONS, floats=stored_tensors(tmp_path / "tied")) for each in (loaded.params, params)
    )
    table = of(tied, "embed_tokens/weight")
    assert of(parted, "lm_head/weight")["error"] == of(parted, "embed_tokens/weight")["error"] == table["error"] > 0
    # A token reads the table once, as the head.
    assert parted["token"]["weight_bytes"] == tied["token"]["weight_bytes"]


def test_the_table_as_text(tiny):
    lines = summary.weights_lines(weigh(tiny.config, tiny.params, **OPTIONS))
    text = "\n".join(lines)
    assert "\033" not in text
    assert any(line.startswith("layers/mlp/down_proj/weight") and "3 x 24 x 40" in line for line in lines)
    assert "MLP down          3 layers x 24 x 40" in text
    assert "a token behind 30 others" in text
    assert "\033[1m" in "".join(summary.weights_lines(weigh(tiny.config, tiny.params, **OPTIONS), colour=True))


@pytest.mark.slow
def test_folders_of_integers_have_no_floats(int4_folder):
    with pytest.raises(ValueError, match="int4: holds integers; the floats that they were made from are not known"):
        stored_tensors(int4_folder)

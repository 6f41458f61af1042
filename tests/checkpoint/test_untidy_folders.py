"""Folders as they are found: parts instead of fused matrices, prefixes, copies, buffers, other files beside them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from adapters import random_adapter

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import named_tensors, save_adapter
from phi3_jax.kernels import why_unavailable

pytestmark = pytest.mark.usefixtures("quick_compilation")


def tensors_of(checkpoint: phi3_jax.Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in named_tensors(checkpoint.params)}


def assert_same(left: phi3_jax.Checkpoint, right: phi3_jax.Checkpoint) -> None:
    ours, theirs = tensors_of(left), tensors_of(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def put(folder: Path, tensors: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    safetensors.numpy.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / file)


def by_hand(tensors: dict[str, np.ndarray], config: phi3_jax.Phi3Config) -> dict[str, np.ndarray]:
    """Llama's names, cut one head at a time."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            heads = [tensor[i * H : (i + 1) * H] for i in range(N + 2 * K)]
            for part, some in {"q": heads[:N], "k": heads[N : N + K], "v": heads[N + K :]}.items():
                found[name.replace("qkv_proj", f"{part}_proj")] = np.concatenate(some)
        elif "gate_up_proj" in name:
            found[name.replace("gate_up", "gate")] = tensor[: config.intermediate_size]
            found[name.replace("gate_up", "up")] = tensor[config.intermediate_size :]
        else:
            found[name] = tensor
    return found


def plain(tiny: phi3_jax.Checkpoint, window: int | None = None) -> phi3_jax.Checkpoint:
    """What a Llama (without a window) or a Mistral computes, too."""
    return dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, long_rope=None, sliding_window=window))


@pytest.fixture
def llama(tiny, tmp_path) -> Path:
    """A folder whose parts stand in different shards."""
    folder = tmp_path / "llama"
    phi3_jax.save(plain(tiny), folder, max_shard_size=3_000, architecture="llama")
    assert len(list(folder.glob("*.safetensors"))) > 9
    return folder


@pytest.mark.parametrize("window", [None, 7])
def test_parts_are_split_and_fused_exactly(tiny, tmp_path, window):
    model = plain(tiny, window)
    phi3_jax.save(model, tmp_path / "x", architecture="llama")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if window is None else "MistralForCausalLM"]
    stored = safetensors.numpy.load_file(tmp_path / "x" / "model.safetensors")
    expected = by_hand(tensors_of(model), model.config)
    assert stored.keys() == expected.keys()
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    loaded = phi3_jax.load(tmp_path / "x")
    assert loaded.config == model.config
    assert_same(loaded, model)
    phi3_jax.save(loaded, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "phi3"
    assert_same(phi3_jax.load(tmp_path / "back"), model)


LAYOUT = "packed" if why_unavailable() is None else "rows"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "layout": LAYOUT},
        {"adapter": "adapter"},
        pytest.param({"quantize": "int8", "layout": LAYOUT}, marks=pytest.mark.slow),
        pytest.param({"quantize": "int4"}, marks=pytest.mark.slow),
    ],
)
def test_parts_in_other_forms_of_weights(tiny, llama, tmp_path, options):
    phi3_jax.save(plain(tiny), tmp_path / "fused")
    if "adapter" in options:
        lora = LoraConfig(3, 6)
        save_adapter(tmp_path / "adapter", random_adapter(tiny.config, lora), lora, tiny.config, "tiny")
        options = {"adapter": tmp_path / "adapter"}
    ours, expected = phi3_jax.load(llama, **options), phi3_jax.load(tmp_path / "fused", **options)
    assert jax.tree.structure(ours.params) == jax.tree.structure(expected.params)
    for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(expected.params), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_parts_of_two_dtypes(tiny, tmp_path):
    model = plain(tiny)
    phi3_jax.save(model, tmp_path / "x", architecture="llama")
    stored = safetensors.numpy.load_file(tmp_path / "x" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    stored[name] = stored[name].astype(np.float16)
    put(tmp_path / "x", stored)
    expected = tensors_of(model)["model.layers.1.self_attn.qkv_proj.weight"].copy()
    expected[48:64] = expected[48:64].astype(np.float16)
    got = phi3_jax.load(tmp_path / "x").params["layers"]["self_attn"]["qkv_proj"]["weight"][1]
    np.testing.assert_array_equal(got, expected)


def test_parts_that_do_not_fit_are_named(tiny, tmp_path):
    model = plain(tiny)
    phi3_jax.save(model, tmp_path / "x", architecture="llama")
    stored = safetensors.numpy.load_file(tmp_path / "x" / "model.safetensors")
    prefix = "model.layers.2.self_attn."
    q, k = stored[f"{prefix}q_proj.weight"], stored[f"{prefix}k_proj.weight"]
    wrong = {f"{prefix}q_proj.weight": q[:40], f"{prefix}k_proj.weight": np.concatenate([q[40:], k])}
    put(tmp_path / "x", stored | wrong)
    with pytest.raises(ValueError, match=r"q_proj\.weight is \[40, 24\] instead of \[48, 24\]"):
        phi3_jax.load(tmp_path / "x")
    put(tmp_path / "x", {name: tensor for name, tensor in stored.items() if name != f"{prefix}v_proj.weight"})
    with pytest.raises(ValueError, match=r"missing tensors: \['model\.layers\.2\.self_attn\.v_proj\.weight'\]"):
        phi3_jax.load(tmp_path / "x")
    mixed = stored | {"model.layers.0.mlp.gate_up_proj.weight": np.ones((80, 24), np.float32)}
    del mixed["model.layers.0.mlp.gate_proj.weight"], mixed["model.layers.0.mlp.up_proj.weight"]
    put(tmp_path / "x", mixed)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_up_proj\.weight is one matrix, but model\.layers\.1"):
        phi3_jax.load(tmp_path / "x")


def test_what_llama_does_not_compute_is_not_written(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"it has factors for its rotary.*; save it as phi3"):
        phi3_jax.save(tiny, tmp_path / "x", architecture="llama")
    partial = dataclasses.replace(plain(tiny).config, partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match=r"MistralForCausalLM does not compute this model: it rotates 4 of 8"):
        phi3_jax.save(
            dataclasses.replace(tiny, config=dataclasses.replace(partial, sliding_window=9)),
            tmp_path / "x",
            architecture="llama",
        )
    phi3_jax.save(plain(tiny), tmp_path / "fused")
    with pytest.raises(ValueError, match="quantised weights are not split"):
        phi3_jax.save(phi3_jax.load(tmp_path / "fused", quantize="int8"), tmp_path / "x", architecture="llama")
    assert not (tmp_path / "x").exists()


def test_prefixes_as_in_transformers(tiny, tiny_folder):
    """It adds a `model.` that is missing and removes one that is there twice."""
    stored = tensors_of(tiny)
    put(tiny_folder, {name.removeprefix("model."): tensor for name, tensor in stored.items()})
    assert_same(phi3_jax.load(tiny_folder), tiny)
    put(tiny_folder, {f"model.{name}": tensor for name, tensor in stored.items()})
    assert_same(phi3_jax.load(tiny_folder), tiny)
    put(tiny_folder, stored | {"norm.weight": stored["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"two tensors model\.norm\.weight, with and without a prefix"):
        phi3_jax.load(tiny_folder)


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("module.", "DataParallel; save `model.module` instead"),
        ("_orig_mod.", "torch.compile; save `model._orig_mod`"),
        ("base_model.model.", r"PEFT; save what `merge_and_unload\(\)` returns"),
    ],
)
def test_names_of_wrappers_are_refused_with_the_remedy(tiny, tiny_folder, prefix, remedy):
    put(tiny_folder, {prefix + name: tensor for name, tensor in tensors_of(tiny).items()})
    with pytest.raises(ValueError, match=remedy):
        phi3_jax.load(tiny_folder)


def test_buffers_and_empty_tensors_hold_no_number_of_the_model(tiny, tiny_folder):
    attention = "model.layers.1.self_attn"
    put(
        tiny_folder,
        tensors_of(tiny)
        | {
            f"{attention}.rotary_emb.cos_cached": np.ones((1, 1, 9, 8), np.float32),
            f"{attention}.masked_bias": np.array(-1e9, np.float32),
            f"{attention}.rotary_emb.inv_freq": np.ones(4, np.float64),
            "model.position_ids": np.arange(9, dtype=np.int32),
            f"{attention}.q_proj.bias": np.zeros(0, np.float32),
        },
    )
    assert_same(phi3_jax.load(tiny_folder), tiny)
    put(tiny_folder, tensors_of(tiny) | {f"{attention}.o_proj.bias": np.zeros(24, np.float32)})
    with pytest.raises(ValueError, match=r"unknown tensors: model\.layers\.1\.self_attn\.o_proj\.bias"):
        phi3_jax.load(tiny_folder)


@pytest.fixture
def shards(tiny, tmp_path) -> Path:
    phi3_jax.save(tiny, tmp_path / "shards", 9_000)
    return tmp_path / "shards"


def test_a_tensor_in_two_shards(tiny, shards):
    """Equal, it does no harm; different, both files are named."""
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(second)
    name, tensor = next(iter(safetensors.numpy.load_file(first).items()))
    put(shards, tensors | {name: tensor}, second.name)
    assert_same(phi3_jax.load(shards), tiny)
    for other in (tensor + np.float32(1e-3), tensor.astype(np.float16), tensor[1:]):
        put(shards, tensors | {name: other}, second.name)
        with pytest.raises(ValueError, match=rf"{first.name} and {second.name} hold different tensors {name}"):
            phi3_jax.load(shards)


def test_the_index_only_names_the_files(tiny, shards):
    """As in transformers: what is in a shard counts, not what the index says about it; other files are not read."""
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(content["weight_map"])
    files = sorted(set(content["weight_map"].values()))
    del content["metadata"]
    content["weight_map"] = dict(zip(names, files, strict=False)) | {"not.there": files[0]}
    index.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    put(shards, {"model.norm.weight": np.zeros(24, np.float32)}, "model-00009-of-00009.safetensors")
    put(shards, {"norm.weight": np.zeros(24, np.float32)}, "consolidated.safetensors")
    assert_same(phi3_jax.load(shards), tiny)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "there is neither model.safetensors nor .*; download the weights"),
        (["pytorch_model.bin"], "pytorch_model.bin is pickled weights, which could execute code; convert them"),
        (["pytorch_model-00001-of-00002.bin"], "is pickled weights"),
        (["model.pth"], "model.pth is pickled weights"),
        (["model-00001-of-00002.safetensors"], "is shards without their model.safetensors.index.json; download that"),
        (["consolidated.safetensors", "x.bin"], "consolidated.safetensors is a file of Mistral's own programs"),
        (["model.fp16.safetensors"], "model.fp16.safetensors is a variant; rename it to model.safetensors"),
        (["pytorch_model.safetensors"], "is a file of another name; rename it"),
        (["adapter_model.safetensors"], "is an adapter; name the checkpoint that it belongs to"),
        (["phi3.gguf"], "phi3.gguf is a GGUF file; name that"),
    ],
)
def test_what_lies_in_the_folder_instead_is_named_with_the_remedy(tiny_folder, files, message):
    (tiny_folder / "model.safetensors").unlink()
    for name in files:
        (tiny_folder / name).write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=message):
        phi3_jax.load(tiny_folder)


def test_pointers_of_git_lfs_are_named(tiny_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7600000000\n"
    for path in (tiny_folder / "model.safetensors", tiny_folder / "phi3.gguf"):
        path.write_text(pointer)
        with pytest.raises(ValueError, match=rf"{path.name}: a pointer of Git LFS, not the weights; .*: git lfs pull"):
            phi3_jax.load(tiny_folder if path.suffix == ".safetensors" else path)


def test_an_adapter_in_the_models_own_folder_belongs_to_it(tiny, tiny_folder, tmp_path):
    """As transformers has it; silently leaving it out would answer with the untrained model."""
    lora = LoraConfig(3, 6)
    save_adapter(tmp_path / "adapter", random_adapter(tiny.config, lora), lora, tiny.config, "tiny")
    expected = phi3_jax.load(tiny_folder, adapter=tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="adapter: an adapter for 'tiny'; name that, and this as its adap"):
        phi3_jax.load(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        (tiny_folder / path.name).write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="the adapter that lies in this folder is added, as by transformers"):
        loaded = phi3_jax.load(tiny_folder)
    for (name, left), (_, right) in zip(named_tensors(loaded.params), named_tensors(expected.params), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert not np.array_equal(
        *(dict(named_tensors(m.params))["model.layers.0.mlp.down_proj.weight"] for m in (tiny, loaded))
    )
    with pytest.raises(ValueError, match="an adapter lies in this folder, too"):
        phi3_jax.load(tiny_folder, adapter=tmp_path / "adapter")


def test_a_tied_head_that_is_damaged_alike_is_tied(tiny, tiny_folder):
    tensors = dict(safetensors.numpy.load_file(tiny_folder / "model.safetensors"))
    table = tensors["model.embed_tokens.weight"].copy()
    table[5] = np.nan
    tensors |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    safetensors.numpy.save_file(tensors, tiny_folder / "model.safetensors")
    raw = json.loads((tiny_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tiny_folder / "config.json").write_text(json.dumps(raw))
    assert phi3_jax.load(tiny_folder).config.tie_word_embeddings


def test_a_link_to_nothing_is_not_an_absent_file(tiny_folder, tmp_path):
    """As in the hub's cache, of which somebody has removed the largest files."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        for path in tiny_folder.iterdir():
            (folder / path.name).symlink_to(path)
        phi3_jax.load(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../../blobs/01ab")
        with pytest.raises(
            FileNotFoundError, match=rf"{name}: a link to ../../blobs/01ab, which is not there; download"
        ):
            phi3_jax.load(folder)


def test_whole_numbers_of_no_meaning_here_may_be_huge(tiny, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"max_length": int(1e30)}))
    assert_same(phi3_jax.load(folder), tiny)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"vocab_size": int(1e30)}))
    with pytest.raises(ValueError, match="vocab_size must be a positive integer"):
        phi3_jax.load(folder)

"""What phi3_jax.save writes, transformers loads: the same bits, the same names, the same logits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import phi3_jax

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.safetensors"))


def stored_names(folder: Path) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            names |= set(file.keys())
    return names


@pytest.fixture
def source(name, tmp_path) -> Path:
    """One golden; its LongRoPE is called `longrope`, because transformers 5.23 fails on the older name `su`."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDENS / name, folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"su"', '"longrope"'), encoding="utf-8")
    return folder


@pytest.mark.parametrize("max_shard_size", [10**9, 12_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_same_bits(reference, source, tmp_path, dtype, max_shard_size):
    saved = tmp_path / "saved"
    phi3_jax.save(phi3_jax.load(source, dtype), saved, max_shard_size=max_shard_size)
    original = reference.load(source, dtype)
    copy, info = reference.load(saved, "auto", output_loading_info=True)
    assert not any(info.values()), info
    assert str(copy.dtype) == f"torch.{dtype}"
    left, right = original.state_dict(), copy.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype
        assert tensor.equal(right[key]), key
    tokens = np.random.default_rng(5).integers(6, 90, (2, 17))
    np.testing.assert_array_equal(reference.logits(copy, tokens), reference.logits(original, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_index_are_those_that_transformers_writes(reference, source, tmp_path):
    checkpoint = phi3_jax.load(source)
    phi3_jax.save(checkpoint, tmp_path / "ours", max_shard_size=12_000)
    reference.load(source).save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    names = stored_names(tmp_path / "ours")
    assert names == stored_names(tmp_path / "theirs")
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    assert ("lm_head.weight" in names) != checkpoint.config.tie_word_embeddings
    ours, theirs = (
        json.loads((tmp_path / who / "model.safetensors.index.json").read_text(encoding="utf-8"))
        for who in ("ours", "theirs")
    )
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert set(ours["weight_map"].values()) == {path.name for path in (tmp_path / "ours").glob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_survives_both_programs(reference, source, tmp_path):
    """Ours -> transformers' layout 5 -> ours again."""
    checkpoint = phi3_jax.load(source)
    phi3_jax.save(checkpoint, tmp_path / "ours")
    reference.load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = phi3_jax.load(tmp_path / "theirs")
    assert again.config == checkpoint.config
    assert again.generation == checkpoint.generation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 5])
def test_transformers_loads_the_same_bits_as_llama(reference, tmp_path, window, dtype):
    """The same weights as Phi-3 and as Llama (with a window: Mistral), in several files."""
    from transformers import AutoModelForCausalLM

    config = phi3_jax.Phi3Config(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=64,
        rope_theta=777.5,
        sliding_window=window,
        tie_word_embeddings=window is None,
        eos_token_id=(2, 5),
        initializer_range=0.3,
    )
    params = phi3_jax.random_params(config, dtype)
    checkpoint = phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings())
    phi3_jax.save(checkpoint, tmp_path / "phi3")
    phi3_jax.save(checkpoint, tmp_path / "llama", max_shard_size=9_000, architecture="llama")
    load = {"dtype": "auto", "attn_implementation": "eager"}
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3", **load)
    copy, info = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True, **load)
    assert not any(info.values()), info
    assert type(copy).__name__ == ("LlamaForCausalLM" if window is None else "MistralForCausalLM")
    left, right = original.state_dict(), copy.state_dict()
    N, K, H = 60, 30, 50
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        parts = left.pop(f"{attention}.qkv_proj.weight").split([N, K, K])
        parts += left.pop(f"{mlp}.gate_up_proj.weight").split([H, H])
        names = [f"{attention}.{name}_proj.weight" for name in "qkv"] + [
            f"{mlp}.{n}_proj.weight" for n in ("gate", "up")
        ]
        left |= dict(zip(names, parts, strict=True))
    assert left.keys() == right.keys()
    assert all(tensor.dtype == right[key].dtype and tensor.equal(right[key]) for key, tensor in left.items())
    tokens = np.random.default_rng(5).integers(0, 61, (2, 17))
    ours, theirs = (reference.logits(each.float(), tokens) for each in (original, copy))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

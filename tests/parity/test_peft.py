"""Adapters live against PEFT: what is written here it loads, what it writes is loaded here, with the same logits."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from adapters import BASE, random_adapter

import phi3_jax
from phi3_jax.adapters import TARGETS, LoraConfig, attach
from phi3_jax.checkpoint import load_adapter, save_adapter

peft = pytest.importorskip("peft", reason="the reference needs PEFT: make parity")
# PEFT asks transformers 5.23 by a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What it says about embeddings: that it stores them, too, and that they are not tied any more.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning"),
]

OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True, "targets": ("o_proj", "gate_up_proj")},
    "dora": {"dora": True},
    "ranks": {"ranks": (("o_proj", 1), ("down_proj", 7)), "alphas": (("o_proj", 2.5),)},
    "embeddings": {"targets": ("o_proj", "embed_tokens", "lm_head"), "ranks": (("lm_head", 4),), "rslora": True},
}
TOKENS = np.random.default_rng(5).integers(6, 90, (2, 17))


def logits(params: Any) -> np.ndarray:
    config = phi3_jax.load(BASE).config
    return np.asarray(phi3_jax.Phi3(config).apply({"params": params}, TOKENS))


@pytest.mark.parametrize("kind", OPTIONS)
def test_peft_loads_what_is_written_here(reference, kind, tmp_path):
    base = phi3_jax.load(BASE)
    lora = LoraConfig(3, 5, dropout=0.1, **OPTIONS[kind])
    adapter = random_adapter(base.config, lora)
    save_adapter(tmp_path / "adapter", adapter, lora, base.config, str(BASE))
    model = peft.PeftModel.from_pretrained(reference.load(BASE), tmp_path / "adapter").eval()
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == set(lora.targets)
    ours = logits(attach(base.params, adapter, lora))
    np.testing.assert_allclose(ours, reference.logits(model, TOKENS), atol=1e-4)
    assert np.abs(ours - logits(base.params)).max() > 1
    merged = model.merge_and_unload().state_dict()
    loaded = phi3_jax.load(BASE, adapter=tmp_path / "adapter").params["layers"]["self_attn"]["o_proj"]["weight"]
    for i, layer in enumerate(loaded):
        theirs = merged[f"model.layers.{i}.self_attn.o_proj.weight"].detach().numpy()
        np.testing.assert_allclose(layer, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": list(TARGETS)},
        {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": False},
        {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["o_proj", "lm_head"], "use_dora": True, "rank_pattern": {"lm_head": 2}},
        {"target_modules": ["o_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 11}},
    ],
)
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_what_peft_writes_is_loaded_here(reference, options, task, tmp_path):
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type=task, **options)
    model = peft.get_peft_model(reference.load(BASE), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task
    base = phi3_jax.load(BASE, layout="rows")
    lora, adapter = load_adapter(tmp_path / "adapter", base.config, base.params)
    ours = logits(attach(base.params, adapter, lora))
    np.testing.assert_allclose(ours, reference.logits(model, TOKENS), atol=1e-4)
    assert np.abs(ours - logits(base.params)).max() > 1
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapter))


@pytest.mark.parametrize(
    ("targets", "tied"), [(("embed_tokens",), False), (("lm_head",), False), (("embed_tokens", "qkv_proj"), True)]
)
def test_peft_loads_what_is_written_here_for_a_tied_model(reference, targets, tied, tmp_path):
    folder = BASE.parent / "partial_tied"
    base, lora = phi3_jax.load(folder), LoraConfig(3, 5, targets, tied=tied)
    adapter = random_adapter(base.config, lora)
    save_adapter(tmp_path / "adapter", adapter, lora, base.config, str(folder))
    model = peft.PeftModel.from_pretrained(reference.load(folder), tmp_path / "adapter").eval()
    ours = phi3_jax.Phi3(base.config).apply({"params": attach(base.params, adapter, lora)}, TOKENS)
    np.testing.assert_allclose(ours, reference.logits(model, TOKENS), atol=1e-4)

"""Forty random adapters of PEFT's option space: merged or attached they give PEFT's logits; a named list is refused.

Each is saved by PEFT with random weights that are far from zero, and loaded by PEFT again for the comparison.
"""

import copy
import functools
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adapters import BASE

import phi3_jax
from phi3_jax.adapters import attach
from phi3_jax.checkpoint import load_adapter

peft = pytest.importorskip("peft", reason="the reference needs PEFT: make parity")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, of every kind; ours are for other tests
    pytest.mark.usefixtures("quick_compilation"),
]

TOKENS = np.random.default_rng(5).integers(6, 90, (2, 17))
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# What is refused, and what the message says of it.
REFUSED = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights, too"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base's weights, too"),
    ({"lora_bias": True}, "lora_bias=True is not computed here"),
    ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens=.* is not computed here"),
    ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=.* is not computed here"),
    ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters=.* is not computed here"),
]


@pytest.fixture(scope="module")
def bases(reference, tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """(our folder, transformers' model) of the same weights: as Phi-3 and as Llama, with a tied head and without."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    ours = phi3_jax.load(BASE)
    tied = tmp_path_factory.mktemp("tied") / "model"
    params = {name: value for name, value in ours.params.items() if name != "lm_head"}
    config = phi3_jax.Phi3Config(**{**ours.config.__dict__, "tie_word_embeddings": True})
    phi3_jax.save(phi3_jax.Checkpoint(config, params, None, ours.generation), tied)
    found = {}
    for name, folder in {"": BASE, "_tied": tied}.items():
        phi3 = reference.load(folder)
        found[f"phi3{name}"] = (folder, phi3)
        theirs = AutoConfig.from_pretrained(folder).to_dict()
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
                "pad_token_id")  # fmt: skip
        llama = LlamaForCausalLM(LlamaConfig(**{key: theirs[key] for key in keys}, attn_implementation="eager"))
        llama.load_state_dict(dict(unfused(phi3.state_dict(), ours.config)))
        found[f"llama{name}"] = (folder, llama)
    return found


def unfused(tensors: dict[str, Any], config: phi3_jax.Phi3Config):
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([heads, keys, keys]), strict=True):
                yield name.replace("qkv_proj", f"{part}_proj"), rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj"), rows
        else:
            yield name, tensor


def drawn(rng: random.Random, kind: str) -> dict[str, Any]:
    """Random options of peft.LoraConfig."""
    names = rng.sample(TARGETS[kind], rng.randint(1, len(TARGETS[kind])))
    rank = rng.randint(1, 5)
    options: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rng.choice([1, rank, 2 * rank]),
        "use_rslora": rng.random() < 0.3,
        "use_dora": rng.random() < 0.35,
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "lora_dropout": rng.choice([0.0, 0.1]),
        "init_lora_weights": rng.choice([True, False, "gaussian"]),
        "task_type": rng.choice(["CAUSAL_LM", None]),
    }
    form = rng.choice(["list", "full", "regex", "all-linear", "list"])
    if form == "list":
        options["target_modules"] = names
        if rng.random() < 0.4:
            options["layers_to_transform"] = rng.choice([0, [1], [0, 1]])
            options["layers_pattern"] = rng.choice([None, "layers", ["layers"]])
    elif form == "full":
        place = {
            name: "mlp" if name in ("down_proj", "gate_proj", "up_proj", "gate_up_proj") else "self_attn"
            for name in names
        }
        options["target_modules"] = [f"model.layers.{rng.randint(0, 1)}.{place[name]}.{name}" for name in names]
    elif form == "regex":
        options["target_modules"] = rng.choice(
            [rf".*\.({'|'.join(names)})", rf"model\.layers\.\d+\.(?:mlp|self_attn)\.(?:{'|'.join(names)})$",
             rf".*?layers\.[1-9]\..*({'|'.join(names)})"]
        )  # fmt: skip
    else:
        options["target_modules"] = "all-linear"
        names = TARGETS[kind]
    if rng.random() < 0.4:
        keys = [rng.choice(names), rf"layers\.1\..*{rng.choice(names)}", f"^model.layers.0.mlp.{names[0]}"]
        # Sorted, as they stand in the file: the first that fits counts, and PEFT does not load what it saves otherwise.
        options["rank_pattern"] = {key: rng.randint(1, 6) for key in sorted(rng.sample(keys, 2))}
    if rng.random() < 0.4:
        options["alpha_pattern"] = {rng.choice([*names, rf"layers.0.*({'|'.join(names)})"]): rng.choice([3, 0.5])}
    if rng.random() < 0.3 and form != "full":
        options["exclude_modules"] = rng.choice([r".*layers\.0.*_proj", ["layers.1.mlp.down_proj"], ["lm_head"]])
    if rng.random() < 0.3:
        options["modules_to_save"] = rng.choice([["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["norm"]])
    elif rng.random() < 0.3 and form == "list" and "layers_to_transform" not in options:
        options["target_modules"] = names + rng.choice([["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
    elif rng.random() < 0.2:
        options["trainable_token_indices"] = [5, 77, 31]
    return options | {"ensure_weight_tying": rng.random() < 0.3, "fan_in_fan_out": rng.random() < 0.2}


def saved(model: Any, folder: Path, dtype: str, seed: int) -> None:
    """Fills what PEFT has added with random numbers, and saves it."""
    import torch

    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
        elif "lora_" in name or "tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.25)
        elif "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    for module in model.modules():  # in 16 bits in the file; in float32 for the product, as PEFT loads it
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)


@functools.partial(jax.jit, static_argnames="config")
def logits(config: Any, params: Any) -> jax.Array:
    return phi3_jax.Phi3(config).apply({"params": params}, TOKENS)


def adapted(rng: random.Random, kind: str, base: Any) -> Any:
    """PEFT's model with random options that fit it."""
    while True:
        try:
            return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**drawn(rng, kind)))
        except peft.tuners.tuners_utils.NoMatchingPeftModuleError:
            continue  # they exclude every module


@functools.cache
def checkpoint(folder: Path) -> phi3_jax.Checkpoint:
    return phi3_jax.load(folder, layout="rows")


def attachable(adapter: Path, folder: Path) -> Any:
    """What `load_adapter` gives, or None where it says that `load` has to merge it."""
    try:
        return load_adapter(adapter, checkpoint(folder).config, checkpoint(folder).params)
    except ValueError as error:
        if "cannot be attached; load the model with it merged" in str(error):
            return None
        raise


@pytest.mark.parametrize("seed", range(40))
def test_a_random_adapter(bases, reference, seed, tmp_path):
    rng = random.Random(seed)
    kind = rng.choice(["phi3", "llama"])
    folder, base = bases[kind + rng.choice(["", "", "_tied"])]
    model = adapted(rng, kind, base)
    saved(model, tmp_path / "adapter", rng.choice(["float32", "float32", "bfloat16", "float16"]), seed)
    theirs = reference.logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval(), TOKENS)
    ours = phi3_jax.load(folder, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(logits(ours.config, ours.params), theirs, atol=1e-4)
    assert np.abs(theirs - reference.logits(base, TOKENS)).max() > 0.1
    if found := attachable(tmp_path / "adapter", folder):
        lora, adapter = found
        attached = logits(checkpoint(folder).config, attach(checkpoint(folder).params, adapter, lora))
        np.testing.assert_allclose(attached, theirs, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_may_be_refused(bases, options, message, tmp_path):
    folder, base = bases["llama"]
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], **options))
    saved(model, tmp_path / "adapter", "float32", 0)
    with pytest.raises(ValueError, match=message):
        phi3_jax.load(folder, adapter=tmp_path / "adapter")

"""Adapters for tests, and the slow obvious way to compute with them."""

import json
import re
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import phi3_jax
from phi3_jax.adapters import Adapter, LoraConfig, adapter_shapes

RECORDED = Path(__file__).parents[2] / "goldens_training"
BASE = Path(__file__).parents[2] / "goldens" / "gqa"


def random_adapter(config: phi3_jax.Phi3Config, lora: LoraConfig, seed: int = 0) -> Adapter:
    """An adapter that is far from zero."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: jnp.asarray(rng.uniform(0.5, 2, shape) if path.endswith("magnitude") else rng.normal(0, 0.3, shape))
        for path, shape in adapter_shapes(config, lora).items()
    }
    return flax.traverse_util.unflatten_dict({k: v.astype(jnp.float32) for k, v in leaves.items()}, sep="/")


def scalings(lora: LoraConfig) -> dict[str, float]:
    """The scaling of each target."""
    return {target: lora.scaling_of(target) for target in lora.targets}


def dense(params: Any, adapter: Adapter, lora: LoraConfig, scaling: float | dict[str, float]) -> Any:
    """Parameters with the adapter multiplied out, differentiable, for whole stacks at a time.

    One scaling, or one for each target.
    """
    weights = flax.traverse_util.flatten_dict(params, sep="/")
    parts = flax.traverse_util.flatten_dict(adapter, sep="/")
    for path in [path for path in parts if path.endswith("/a")]:
        place = path.removesuffix("/a")
        own = scaling[place.split("/")[-1]] if isinstance(scaling, dict) else scaling
        sums = weights[f"{place}/weight"] + own * jnp.einsum("...or,...ri->...oi", parts[f"{place}/b"], parts[path])
        if lora.dora:
            norms = jax.lax.stop_gradient(jnp.sqrt((sums**2).sum(-1)))
            sums = sums * (parts[f"{place}/magnitude"] / norms)[..., None]
        weights[f"{place}/weight"] = sums
    return flax.traverse_util.unflatten_dict(weights, sep="/")


# ------------------------------------------------------------------------------------- PEFT's files, tensor by tensor


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    """The two files, in a folder of their own."""
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    return folder


def peft_tensors(weights: dict[str, np.ndarray], ranks: dict[str, int], dora: bool = False) -> dict[str, np.ndarray]:
    """Random updates of modules {"model.layers.0.self_attn.q_proj": 3}, with PEFT's names."""
    rng, found = np.random.default_rng(len(ranks)), {}
    for module, rank in ranks.items():
        outputs, inputs = weights[f"{module}.weight"].shape
        a, b = "lora_A.weight", "lora_B.weight"
        if module.endswith("embed_tokens"):  # PEFT adapts its transpose
            a, b, outputs, inputs = "lora_embedding_A", "lora_embedding_B", inputs, outputs
        found[f"base_model.model.{module}.{a}"] = rng.normal(size=(rank, inputs))
        found[f"base_model.model.{module}.{b}"] = rng.normal(size=(outputs, rank))
        if dora:
            found[f"base_model.model.{module}.lora_magnitude_vector"] = rng.uniform(0.5, 2, outputs)
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def multiplied_out(
    weights: dict[str, np.ndarray], tensors: dict[str, np.ndarray], scaling: float | dict[str, float]
) -> dict[str, np.ndarray]:
    """Weights by name with PEFT's tensors added, in float64; one scaling, or one for each module."""
    found = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    for name in tensors:
        if not (match := re.fullmatch(r"base_model\.model\.(.*)\.(lora_A\.weight|lora_embedding_A)", name)):
            continue
        module, key = match[1], f"{match[1]}.weight"
        a, b = (tensors[each].astype(np.float64) for each in (name, name.replace("_A", "_B")))
        turned = "embedding" in match[2]
        sums = found[key].T if turned else found[key]
        sums = sums + (scaling[module] if isinstance(scaling, dict) else scaling) * b @ a
        if (magnitude := tensors.get(f"base_model.model.{module}.lora_magnitude_vector")) is not None:
            sums = sums * (magnitude / np.sqrt((sums**2).sum(1)))[:, None]
        found[key] = sums.T if turned else sums
    return found


def separate(weights: dict[str, np.ndarray], config: phi3_jax.Phi3Config) -> dict[str, np.ndarray]:
    """Weights by name, with the fused ones in the parts that Llama has."""
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            parts = zip("qkv", np.split(weight, [heads, heads + keys]), strict=True)
            found |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), np.split(weight, 2), strict=True)
            found |= {name.replace("gate_up_proj", f"{part}_proj"): rows for part, rows in parts}
        else:
            found[name] = weight
    return found

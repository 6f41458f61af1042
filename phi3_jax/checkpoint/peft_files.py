"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, read and written.

The matrices have the names of Hugging Face's Phi-3, where q, k and v are fused, and gate and up. If the published base
has them separately (Llama, and so the demo model), an adapter that is written here does not fit the published model,
but the checkpoint that `phi3_jax.save` writes of it, which transformers loads as Phi-3.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import TARGETS, Adapter, LoraConfig, adapter_shapes, merged
from phi3_jax.checkpoint import safetensors_files
from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.checkpoint.hub import download, is_hub_id
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config
from phi3_jax.model import tensor_names
from phi3_jax.text import tokenizer_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "layers_to_transform",
    "bias", "init_lora_weights",
}  # fmt: skip
# Ignored: where the file came from, how the adapter was initialised, how it is held in memory.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# Others (pissa, olora, loftq, ...) change the base's weights before the adapter is trained on them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, lora: LoraConfig, config: Phi3Config, base_name: str
) -> None:
    """Writes an adapter that PEFT loads; the folder appears whole or not at all.

    Args:
      config: of the model that the adapter is for.
      base_name: the model's name or folder, by which PEFT finds it.

    Raises:
      FileExistsError: the folder is there already.
      OSError: there is not enough room for it.
      ValueError: the adapter does not fit this model, or `lora`.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(adapter, sep="/").items()}
    if {path: leaf.shape for path, leaf in leaves.items()} != adapter_shapes(config, lora):
        raise ValueError("the adapter's leaves are not those of the model and the LoraConfig that are given with it")
    tensors = {
        name: layer for path, leaf in leaves.items() for name, layer in zip(_names(path, len(leaf)), leaf, strict=True)
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": list(lora.targets),
        "bias": "none",
    }
    with new_folder(Path(folder), sum(leaf.nbytes for leaf in leaves.values())) as partial:
        safetensors_files.write_file(partial / WEIGHTS, tensors)
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | os.PathLike[str], config: Phi3Config) -> tuple[LoraConfig, Adapter]:
    """Reads an adapter for a model of these sizes, as float32. Layers that it leaves out get zeros.

    The folder may be a hub id, of which only the adapter's two files are fetched.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, does not fit the model, or describes something that is not implemented here.
    """
    place = Path(folder)
    if not place.exists() and is_hub_id(folder):
        place = download(str(folder), (CONFIG, WEIGHTS))
    settings, sources = _read_config(place / CONFIG), _read_weights(place / WEIGHTS)
    adapted = _adapted(settings, config, place / CONFIG)
    keys = {"use_rslora": "rslora", "lora_dropout": "dropout", "use_dora": "dora"}
    options = {ours: settings[theirs] for theirs, ours in keys.items() if theirs in settings}
    try:
        targets = tuple(target for target in TARGETS if target in adapted)
        lora = LoraConfig(settings.get("r", 8), settings.get("lora_alpha", 8), targets, **options)
    except ValueError as error:
        raise ValueError(f"{place / CONFIG}: {error}") from None
    if lora.dora and any(len(layers) < config.num_hidden_layers for layers in adapted.values()):
        raise ValueError(f"{place / CONFIG}: DoRA of some layers only is not computed here; {_REMEDY}")
    shapes = adapter_shapes(config, lora)
    _check_tensors(sources, shapes, adapted, place / WEIGHTS)
    leaves = {}
    for path, shape in shapes.items():
        stack, names = np.zeros(shape, np.float32), _names(path, shape[0])
        for i in adapted[path.split("/")[-2]]:
            stack[i] = sources[names[i]].read()
        leaves[path] = jnp.asarray(stack)
    return lora, flax.traverse_util.unflatten_dict(leaves, sep="/")


def merged_sources(
    sources: Mapping[str, TensorSource], folder: str | os.PathLike[str] | None, config: Phi3Config
) -> Mapping[str, TensorSource]:
    """A checkpoint's tensors, to which an adapter is added when they are read; None adds nothing.

    Raises the errors of `load_adapter`.
    """
    if folder is None:
        return sources
    lora, adapter = load_adapter(folder, config)

    def read(source: TensorSource, parts: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(merged(jnp.asarray(source.read()), parts, lora.scaling))

    found = dict(sources)
    flat = flax.traverse_util.flatten_dict(adapter, is_leaf=lambda _, value: "a" in value)
    for path, stacks in flat.items():
        for i, name in enumerate(tensor_names("/".join((*path, "weight")), config.num_hidden_layers)):
            if name in sources:  # `assemble` reports those that are missing
                parts = {part: stack[i] for part, stack in stacks.items()}
                found[name] = TensorSource(
                    sources[name].shape, "float32", functools.partial(read, sources[name], parts)
                )
    return found


_REMEDY = "merge the adapter into its model with PEFT (merge_and_unload, save_pretrained) and load that"


def _names(path: str, layers: int) -> list[str]:
    """PEFT's names of the tensors in one leaf, "layers/mlp/down_proj/a"."""
    place, _, part = path.rpartition("/")
    return [_PREFIX + name for name in tensor_names(f"{place}/{_PARTS[part]}", layers)]


def _read_config(path: Path) -> dict[str, Any]:
    """Reads adapter_config.json; settings that are not implemented here raise ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file is missing; name a folder that PEFT or this library wrote")
    settings = tokenizer_files.read_json(path)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}, and only 'LORA' is computed here; {_REMEDY}")
    if (bias := settings.get("bias", "none")) != "none":
        raise ValueError(f"{path}: bias={bias!r}: there are no biases here; {_REMEDY}")
    if (init := settings.get("init_lora_weights")) not in _INITS:
        raise ValueError(f"{path}: init_lora_weights={init!r} changes the base's weights, too; {_REMEDY}")
    if wrong := [key for key, value in settings.items() if key not in _READ | _INERT and value]:
        raise ValueError(f"{path}: {wrong[0]}={settings[wrong[0]]!r} is not computed here; {_REMEDY}")
    return settings


def _read_weights(path: Path) -> dict[str, TensorSource]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file is missing; adapter_model.bin is not read: save it as safetensors")
    return safetensors_files.read_file(path)


def _adapted(settings: Mapping[str, Any], config: Phi3Config, path: Path) -> dict[str, list[int]]:
    """The layers in which each of TARGETS is adapted ({"o_proj": [0, 1]}), if any; names are matched as in PEFT."""
    asked, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if asked != "all-linear" and not (isinstance(asked, list) and all(isinstance(name, str) for name in asked)):
        raise ValueError(f"{path}: target_modules={asked!r} must be a list of names, or 'all-linear'")
    if not (layers is None or isinstance(layers, int | list)):
        raise ValueError(f"{path}: layers_to_transform={layers!r} must be a layer's number, or a list of them")
    chosen = [layers] if isinstance(layers, int) else layers or range(config.num_hidden_layers)
    lora = LoraConfig(1, 1)
    found: dict[str, list[int]] = {}
    for leaf in adapter_shapes(config, lora):
        place, _, part = leaf.rpartition("/")
        for i, name in enumerate(tensor_names(place, config.num_hidden_layers) if part == "a" else []):
            matches = asked == "all-linear" or any(f".{name}".endswith(f".{each}") for each in asked)
            if matches and i in chosen:
                found.setdefault(place.split("/")[-1], []).append(i)
    if not found:
        raise ValueError(
            f"{path}: target_modules={asked!r} names none of {', '.join(TARGETS)} in any layer that it is for"
        )
    return found


def _check_tensors(
    sources: Mapping[str, TensorSource],
    shapes: Mapping[str, tuple[int, ...]],
    adapted: Mapping[str, list[int]],
    path: Path,
) -> None:
    expected = {
        name: shape[1:]
        for leaf, shape in shapes.items()
        for i, name in enumerate(_names(leaf, shape[0]))
        if i in adapted[leaf.split("/")[-2]]
    }
    problems = {
        "missing tensors": sorted(expected.keys() - sources.keys()),
        "unknown tensors": sorted(sources.keys() - expected.keys()),
        "wrong shapes": [
            f"{name} is {list(sources[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in sources and sources[name].shape != shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(which[:8])}" for what, which in problems.items() if which)
        raise ValueError(f"{path}: not an adapter of this model, or not as {CONFIG} says; {told}")

"""Adapters written in PEFT's format.

The matrices have the names of Hugging Face's Phi-3, where q, k and v are fused, and gate and up. If the published base
has them separately (Llama, and so the demo model), an adapter that is written here does not fit the published model,
but the checkpoint that `phi3_jax.save` writes of it, which transformers loads as Phi-3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import flax.traverse_util
import numpy as np

from phi3_jax.adapters import HEAD, TABLE, Adapter, LoraConfig, adapter_shapes
from phi3_jax.checkpoint import safetensors_files
from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.checkpoint.peft.reader import PREFIX, WEIGHTS, read_adapter
from phi3_jax.checkpoint.peft.settings import CONFIG
from phi3_jax.config import Phi3Config
from phi3_jax.model import tensor_names

_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


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
    tensors = {name: tensor for path, leaf in leaves.items() for name, tensor in _tensors(path, leaf, lora.tied)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # A folder's name need not be UTF-8, but JSON is.
        "base_model_name_or_path": base_name.encode("utf-8", "replace").decode(),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "rank_pattern": _pattern(lora.ranks, lora.tied),
        "alpha_pattern": _pattern(lora.alphas, lora.tied),
        "ensure_weight_tying": lora.tied,
        "target_modules": list(lora.targets),
        "bias": "none",
    }
    with new_folder(Path(folder), sum(leaf.nbytes for leaf in leaves.values())) as partial:
        safetensors_files.write_file(partial / WEIGHTS, tensors)
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        read_adapter(partial, config)  # what is written can be read again


def _pattern(pairs: Sequence[tuple[str, float]], tied: bool) -> dict[str, float]:
    """The numbers of single targets; a tied adapter's head, which PEFT gives its own, has the embedding's."""
    found = dict(pairs)
    return found | ({HEAD: found[TABLE]} if tied and TABLE in found else {})


def _tensors(path: str, leaf: np.ndarray, tied: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(PEFT's name, tensor) for all that one leaf, "layers/mlp/down_proj/a", becomes."""
    place, _, part = path.rpartition("/")
    if place.startswith("layers/"):
        names = tensor_names(f"{place}/{_PARTS[part]}", len(leaf))
        yield from ((PREFIX + name, layer) for name, layer in zip(names, leaf, strict=True))
    if place == TABLE:  # PEFT adapts its transpose
        other = {"a": "lora_embedding_B", "b": "lora_embedding_A"}[part]
        yield f"{PREFIX}model.{TABLE}.{other}", np.ascontiguousarray(leaf.T)
    if place == HEAD or (place == TABLE and tied):
        yield f"{PREFIX}{HEAD}.{_PARTS[part]}", leaf

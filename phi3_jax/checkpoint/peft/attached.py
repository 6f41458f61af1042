"""An adapter as a tree that is stacked over the layers, to be attached to weights: for training or a trial."""

from __future__ import annotations

import dataclasses
import os

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import TARGETS, Adapter, LoraConfig, adapter_shapes
from phi3_jax.checkpoint.peft.reader import AdapterFiles, Update, read_adapter
from phi3_jax.checkpoint.peft.settings import CONFIG
from phi3_jax.config import Phi3Config

_REMEDY = "load the model with it merged: load(..., adapter=), or --adapter"


def load_adapter(folder: str | os.PathLike[str], config: Phi3Config) -> tuple[LoraConfig, Adapter]:
    """Reads an adapter for a model of these sizes, as float32. Layers that it leaves out get zeros.

    What it computes is exactly what PEFT computes. Where its modules have several ranks, or are the separate q_proj,
    k_proj and v_proj (gate_proj and up_proj) of Llama and Mistral, its rank is the largest that a matrix of ours needs:
    the parts stand below one another in a, and as diagonal blocks in b; the rest is zeros. Several alphas become
    factors of b. Training it further then is training of the fused matrices' adapter: the blocks of zeros beside the
    diagonal learn, too, and b's factors change its speed. For one rank, one alpha and fused names nothing changes.

    Args:
      folder: or a hub id, of which only the adapter's two files are fetched.

    Warns:
      UserWarning: see `read_adapter`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, does not fit the model, or describes something that is not implemented here, or
        that `load` can merge but that cannot be attached: embeddings, heads, weights in full, DoRA of some rows only.
    """
    return stacked(read_adapter(folder, config), config)


def stacked(files: AdapterFiles, config: Phi3Config) -> tuple[LoraConfig, Adapter]:
    """`load_adapter` of files that are checked already. Raises ValueError for what cannot be attached."""
    _check_attachable(files)
    stacks: dict[tuple[str, int], list[Update]] = {}
    for update in files.updates:
        stacks.setdefault((update.module.path, update.module.layer or 0), []).append(update)
    lora = _common(files, stacks)
    shapes = adapter_shapes(config, lora)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    filled = {path: np.zeros(shape[:2], bool) for path, shape in shapes.items() if path.endswith("/b")}
    for (path, layer), updates in stacks.items():
        first = 0
        for update in updates:
            ranks, rows = slice(first, first := first + update.lora.rank), update.module.rows
            leaves[f"{path}/a"][layer, ranks] = update.a.read()
            factor = update.lora.scaling / lora.scaling if lora.scaling else 1
            leaves[f"{path}/b"][layer, rows, ranks] = update.b.read().astype(np.float32) * np.float32(factor)
            filled[f"{path}/b"][layer, rows] = True
            if update.magnitude is not None:
                leaves[f"{path}/magnitude"][layer, rows] = update.magnitude.read()
    if lora.dora and not all(rows.all() for rows in filled.values()):
        raise ValueError(f"{files.settings.path}: DoRA of some layers or rows only cannot be attached; {_REMEDY}")
    return lora, flax.traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def _check_attachable(files: AdapterFiles) -> None:
    others = [m.name for m, _ in files.base + files.whole] + [m.name for m, _, _ in files.rows]
    others += [update.module.name for update in files.updates if update.module.kind != "linear"]
    if others:
        told = ", ".join(others[:8])
        raise ValueError(f"{files.weights}: changes {told}, which cannot be attached; {_REMEDY}")


def _common(files: AdapterFiles, stacks: dict[tuple[str, int], list[Update]]) -> LoraConfig:
    """The one LoraConfig that all updates fit: that of the file where it can be kept."""
    places = {path.split("/")[-1] for path, _ in stacks}
    targets = tuple(target for target in TARGETS if target in places)
    rank = max(sum(update.lora.rank for update in updates) for updates in stacks.values())
    kinds = {update.lora for update in files.updates}
    first = files.updates[0].lora
    if len(kinds) == 1 and first.rank == rank:
        return dataclasses.replace(first, targets=targets)
    scalings = {update.lora.scaling for update in files.updates}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    try:
        return dataclasses.replace(first, rank=rank, alpha=scaling * rank, targets=targets, rslora=False)
    except ValueError as error:
        raise ValueError(f"{files.settings.path.parent / CONFIG}: {error}") from None

"""An adapter as a tree that is stacked over the layers, to be attached to weights: for training or a trial."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import HEAD, TABLE, TARGETS, Adapter, LoraConfig, adapter_shapes
from phi3_jax.checkpoint.peft.modules import Module, is_unfused
from phi3_jax.checkpoint.peft.reader import AdapterFiles, Update, read_adapter
from phi3_jax.checkpoint.peft.trained_on import kind_of_weights, warn_of_others
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config
from phi3_jax.model import Params

_REMEDY = "load the model with it merged: load(..., adapter=), or --adapter"
# The updates of a matrix by target and layer (0 outside of the layers).
_ByPlace = dict[str, dict[int, list[Update]]]


@dataclasses.dataclass(frozen=True)
class AttachableAdapter:
    """An adapter, ready to be attached.

    Attributes:
      lora, adapter: what `attach` takes.
      pads: the targets whose further training differs from PEFT's, because several modules, or modules of several ranks
        or alphas, have become one update (`load_adapter`).
    """

    lora: LoraConfig
    adapter: Adapter
    pads: tuple[str, ...]


def load_adapter(
    folder: str | os.PathLike[str], config: Phi3Config, params: Params | None = None
) -> tuple[LoraConfig, Adapter]:
    """Reads an adapter for a model of these sizes, as float32. Layers that it leaves out get zeros.

    What it computes is exactly what PEFT computes, and each target keeps its rank and its alpha. Where modules of one
    target have several, or are the separate q_proj, k_proj and v_proj (gate_proj and up_proj) of Llama and Mistral, its
    rank is the largest that a matrix of ours needs: the parts stand below one another in a, and as diagonal blocks in
    b; the rest is zeros. Several alphas become factors of b. Training it further then is training of the fused
    matrices' adapter: the blocks of zeros beside the diagonal learn, too, and b's factors change its speed. For fused
    names with one rank and one alpha for each target nothing changes.

    Args:
      folder: or a hub id, of which only the adapter's own files are fetched.
      params: the model's parameters. They are only needed, as floats, where an embedding or a head is adapted and PEFT
        has stored its weight below the update, too, which has to be the model's own.

    Warns:
      UserWarning: see `read_adapter`; or the adapter was trained on other weights than `params`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, does not fit the model, or describes something that is not implemented here, or
        that `load` can merge but that cannot be attached: weights in full, DoRA of the embedding or of some rows only.
    """
    found = read_attachable(folder, config, params)
    return found.lora, found.adapter


def read_attachable(
    folder: str | os.PathLike[str], config: Phi3Config, params: Params | None = None
) -> AttachableAdapter:
    """`load_adapter`, with what training has to know of the file."""
    files = read_adapter(folder, config)
    if params is not None:
        warn_of_others(files.settings.path, kind_of_weights(params))
    return stacked(files, config, params)


def stacked(files: AdapterFiles, config: Phi3Config, params: Params | None = None) -> AttachableAdapter:
    """`read_attachable` of files that are checked already. Raises ValueError for what cannot be attached."""
    _check_attachable(files, params)
    places, tied = _by_place(files, config)
    lora, pads = _common(files, places, tied)
    shapes = adapter_shapes(config, lora)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    # Views with an axis of layers everywhere.
    stacks = {path: leaf if path.startswith("layers/") else leaf[None] for path, leaf in leaves.items()}
    filled = {path: np.zeros(stack.shape[:2], bool) for path, stack in stacks.items() if path.endswith("/b")}
    for target, by_layer in places.items():
        for layer, updates in by_layer.items():
            first = 0
            for update in updates:
                ranks, rows = slice(first, first := first + update.lora.rank), update.module.rows
                path, (a, b) = update.module.path, _arrays(update)
                scaling = lora.scaling_of(target)
                stacks[f"{path}/a"][layer, ranks] = a
                stacks[f"{path}/b"][layer, rows, ranks] = b * np.float32(
                    update.lora.scaling / scaling if scaling else 1
                )
                filled[f"{path}/b"][layer, rows] = True
                if update.magnitude is not None:
                    stacks[f"{path}/magnitude"][layer, rows] = update.magnitude.read()
    if lora.dora and not all(rows.all() for rows in filled.values()):
        raise ValueError(f"{files.settings.path}: DoRA of some layers or rows only cannot be attached; {_REMEDY}")
    adapter = flax.traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")
    return AttachableAdapter(lora, adapter, pads)


def _check_attachable(files: AdapterFiles, params: Params | None) -> None:
    adapted = {update.module.name for update in files.updates if update.module.kind in ("embedding", "head")}
    below = [(m, source) for m, source in files.base if m.name in adapted]
    others = [m.name for m, _ in files.base if m.name not in adapted]
    others += [m.name for m, _ in files.whole] + [m.name for m, _, _ in files.rows]
    if files.settings.lora.dora:
        others += [update.module.name for update in files.updates if update.module.kind == "embedding"]
    others += [m.name for m, source in below if params is not None and not _is_own(m, source, params)]
    if others:
        told = ", ".join(others[:8])
        raise ValueError(f"{files.weights}: changes {told}, which cannot be attached; {_REMEDY}")
    if below and params is None:
        told = ", ".join(m.name for m, _ in below)
        raise ValueError(
            f"{files.weights}: stores the weights of {told}, too: give load_adapter the model's params, to compare them"
        )


def _is_own(module: Module, source: TensorSource, params: Params) -> bool:
    """Whether a stored weight is the model's own, as far as the smaller of the two dtypes tells."""
    leaf: Any = (params[module.path] if module.path in params else params[TABLE])["weight"]
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(
            f"{module.name} is a {type(leaf).__name__}, and the adapter stores that weight as floats, with which it "
            "cannot be compared: load the model as floats, or take the stored weight out of the adapter's file "
            "(PEFT: save_pretrained(save_embedding_layers=False))"
        )
    theirs, ours = np.asarray(source.read()), np.asarray(leaf)
    return np.array_equal(theirs.astype(ours.dtype), ours) or np.array_equal(theirs, ours.astype(theirs.dtype))


def _by_place(files: AdapterFiles, config: Phi3Config) -> tuple[_ByPlace, bool]:
    """The updates by target and layer; and whether the head's is the embedding's, so that it is not among them."""
    places: _ByPlace = collections.defaultdict(lambda: collections.defaultdict(list))
    for update in files.updates:
        places[update.module.path.split("/")[-1]][update.module.layer or 0].append(update)
    if not (files.settings.tied and config.tie_word_embeddings and places.keys() >= {TABLE, HEAD}):
        return places, False
    (table,), (head,) = places[TABLE][0], places[HEAD][0]
    tied = table.lora == head.lora and all(map(np.array_equal, _arrays(table), _arrays(head)))
    if tied:
        del places[HEAD]
    return places, tied


def _arrays(update: Update) -> tuple[np.ndarray, np.ndarray]:
    """a [R, I] and b [O, R], float32, of the weight as it lies in the tree; PEFT adapts the embedding's transpose."""
    a, b = (np.asarray(source.read()).astype(np.float32) for source in (update.a, update.b))
    return (b.T, a.T) if update.module.kind == "embedding" else (a, b)


def _common(files: AdapterFiles, places: _ByPlace, tied: bool) -> tuple[LoraConfig, tuple[str, ...]]:
    """The one LoraConfig that all updates fit, and the targets for which it is not the file's."""
    targets = tuple(target for target in (*TARGETS, TABLE, HEAD) if target in places)
    lora, pads = files.settings.lora, []
    ranks, alphas = dict[str, int](), dict[str, float]()
    for target in targets:
        updates = [update for parts in places[target].values() for update in parts]
        ranks[target] = max(sum(update.lora.rank for update in parts) for parts in places[target].values())
        scalings = {update.lora.scaling for update in updates}
        # Rows of zeros in a that meet columns of zeros in b get no gradient: a layer's smaller rank changes nothing.
        if len(scalings) > 1 or any(is_unfused(update.module.name) for update in updates):
            pads.append(target)
        if {update.lora.rank for update in updates} == {ranks[target]} and len(scalings) == 1:
            alphas[target] = updates[0].lora.alpha
            continue
        scaling = scalings.pop() if len(scalings) == 1 else 1.0
        alphas[target] = scaling * (math.sqrt(ranks[target]) if lora.rslora else ranks[target])
    own_ranks = tuple((target, rank) for target, rank in ranks.items() if rank != lora.rank)
    own_alphas = tuple((target, alpha) for target, alpha in alphas.items() if alpha != lora.alpha)
    try:
        found = dataclasses.replace(lora, targets=targets, tied=tied, ranks=own_ranks, alphas=own_alphas)
    except ValueError as error:
        raise ValueError(f"{files.settings.path}: {error}") from None
    return found, tuple(pads)

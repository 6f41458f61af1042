"""A checkpoint's tensors with an adapter added, as they are read."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import merged
from phi3_jax.checkpoint.peft.modules import HEAD, TABLE
from phi3_jax.checkpoint.peft.reader import AdapterFiles, Update, read_adapter
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config

# Changes one tensor of the checkpoint, float32 and writable, in place.
Change = Callable[[np.ndarray], None]


def merged_sources(
    sources: Mapping[str, TensorSource], folder: str | os.PathLike[str] | None, config: Phi3Config
) -> tuple[Mapping[str, TensorSource], Phi3Config]:
    """A checkpoint's tensors, to which an adapter is added when they are read, and the configuration that fits them.

    None adds nothing. An adapter of the embedding alone, or of the head, unties the two, as in PEFT.

    Warns:
      UserWarning: it unties them; or see `read_adapter`.

    Raises:
      The errors of `read_adapter`.
    """
    if folder is None or config.num_hidden_layers > len(sources):  # `assemble` refuses the second
        return sources, config
    files = read_adapter(folder, config)
    found = dict(sources)
    for module, source in files.base:
        tied = config.tie_word_embeddings and module.name == HEAD
        name = f"{TABLE}.weight" if tied else module.weight
        _change(found, name, functools.partial(_put, module.rows, source), files)
    own = {m.name for m, _ in files.whole} | {update.module.name for update in files.updates}
    if config.tie_word_embeddings and own & {TABLE, HEAD} and f"{TABLE}.weight" in found:
        if not files.settings.tied:
            names = " and ".join(sorted(own & {TABLE, HEAD}))
            warnings.warn(f"{files.weights}: changes {names}, which were tied: they are not any more", stacklevel=3)
        found[f"{HEAD}.weight"] = found[f"{TABLE}.weight"]
        config = dataclasses.replace(config, tie_word_embeddings=False)
    for weight, change in _changes(files):
        _change(found, weight, change, files)
    return found, config


def _changes(files: AdapterFiles) -> list[tuple[str, Change]]:
    changes: list[tuple[str, Change]] = []
    for module, source in files.whole:
        changes.append((module.weight, functools.partial(_put, module.rows, source)))
    for module, ids, source in files.rows:
        changes.append((module.weight, functools.partial(_put, ids, source)))
    for update in files.updates:
        changes.append((update.module.weight, functools.partial(_add, update)))
    return changes


def _change(sources: dict[str, TensorSource], name: str, change: Change, files: AdapterFiles) -> None:
    """Puts a change on top of a tensor."""
    if name not in sources:
        raise ValueError(f"{files.weights}: changes {name}, which is missing in the checkpoint")
    source = sources[name]

    def read() -> np.ndarray:
        weight = np.array(source.read(), np.float32)
        change(weight)
        return weight

    sources[name] = TensorSource(source.shape, "float32", read)


def _put(rows: slice | list[int], source: TensorSource, weight: np.ndarray) -> None:
    weight[rows] = source.read()


def _add(update: Update, weight: np.ndarray) -> None:
    part = weight[update.module.rows]
    parts = {"a": update.a, "b": update.b} | ({"magnitude": update.magnitude} if update.magnitude else {})
    arrays = {name: jnp.asarray(source.read()) for name, source in parts.items()}
    # Of the embedding, PEFT adapts the transpose.
    turned = part.T if update.module.kind == "embedding" else part
    changed = np.asarray(merged(jnp.asarray(turned), arrays, update.lora.scaling))
    weight[update.module.rows] = changed.T if update.module.kind == "embedding" else changed

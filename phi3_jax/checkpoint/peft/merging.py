"""A checkpoint's tensors with an adapter added, as they are read."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import merged
from phi3_jax.checkpoint.peft.modules import HEAD, TABLE, Module
from phi3_jax.checkpoint.peft.reader import AdapterFiles, Update
from phi3_jax.checkpoint.peft.trained_on import warn_of_others
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config

# Changes one tensor of the checkpoint, float32 and writable, in place.
Change = Callable[[np.ndarray], None]


def merged_sources(
    sources: Mapping[str, TensorSource], files: AdapterFiles, config: Phi3Config
) -> tuple[dict[str, TensorSource], Phi3Config]:
    """A checkpoint's tensors, to which an adapter is added when they are read, and the configuration that fits them.

    An adapter of the embedding alone, or of the head, unties the two, as in PEFT.

    Warns:
      UserWarning: it unties them, or was trained on integers.

    Raises:
      ValueError: a tensor that it changes is missing.
    """
    found = dict(sources)
    warn_of_others(files.settings.path, "")
    for module, change in base_changes(files):
        tied = config.tie_word_embeddings and module.name == HEAD
        _change(found, f"{TABLE}.weight" if tied else module.weight, change, files)
    if f"{TABLE}.weight" in found and unties(files, config):
        found[f"{HEAD}.weight"] = found[f"{TABLE}.weight"]
        config = dataclasses.replace(config, tie_word_embeddings=False)
    for module, change in changes(files):
        _change(found, module.weight, change, files)
    return found, config


def unties(files: AdapterFiles, config: Phi3Config) -> bool:
    """Whether the embedding and the head, which were one matrix, become two. Warns if that was not asked for."""
    own = {m.name for m, _ in files.whole} | {update.module.name for update in files.updates}
    if not config.tie_word_embeddings or not own & {TABLE, HEAD}:
        return False
    if not files.settings.tied:
        names = " and ".join(sorted(own & {TABLE, HEAD}))
        warnings.warn(f"{files.weights}: changes {names}, which were tied: they are not any more", stacklevel=4)
    return True


def base_changes(files: AdapterFiles) -> list[tuple[Module, Change]]:
    """What is done to weights before all else, and so to a head that is tied to the embedding."""
    return [(module, functools.partial(_put, module.rows, source)) for module, source in files.base]


def changes(files: AdapterFiles) -> list[tuple[Module, Change]]:
    """What is done to weights then, in this order."""
    found: list[tuple[Module, Change]] = []
    for module, source in files.whole:
        found.append((module, functools.partial(_put, module.rows, source)))
    for module, ids, source in files.rows:
        found.append((module, functools.partial(_put, ids, source)))
    for update in files.updates:
        found.append((update.module, functools.partial(_add, update)))
    return found


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

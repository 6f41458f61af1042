"""Several LoRA adapters on one model, whose rows may run together: the weights for the rows of a batch.

The ranks of all adapters stand side by side (`kernels.LoraRows`), and what differs from batch to batch is the scaling
of each row alone: no program is compiled for an adapter, nor for another mixture of them.

Axis letters: L layer, O outputs, I inputs, R ranks of all adapters together, B rows of a batch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import HEAD, TABLE, LoraConfig
from phi3_jax.checkpoint import Checkpoint, load_adapter
from phi3_jax.kernels import LoraRows, PerLayer
from phi3_jax.model import Params

_REMEDY = "merge it (phi3-export, or load(adapter=)) and serve it alone"
_MOST_KEPT = 256  # mixtures whose scalings are kept on the device

# One adapter's part of a matrix: a [(L,) R, I], b [(L,) O, R] and the factor of b @ a.
_Part = tuple[np.ndarray, np.ndarray, float]


class Adapters:
    """Adapters by name, attached to a model's weights.

    Attributes:
      names: of the adapters, in the order in which they were given.
    """

    def __init__(self, params: Params, is_tied: bool, parts: Mapping[str, Mapping[str, _Part]]):
        """`load` makes one; `parts` are each adapter's, by matrix: "layers/mlp/down_proj"."""
        self.names = tuple(parts)
        self._leaves = flax.traverse_util.flatten_dict(params, sep="/")
        self._scalings: dict[str, np.ndarray] = {}  # by path: float32 [1 + adapters, R], the model itself first
        self._ab: dict[str, tuple[Any, Any]] = {}
        self._kept: OrderedDict[tuple[str | None, ...], dict[str, Any]] = OrderedDict()
        for place in sorted({place for each in parts.values() for place in each}):
            path = f"{place}/weight"
            if place == HEAD and is_tied:
                self._leaves.setdefault(path, self._leaves[f"{TABLE}/weight"])
            own = {name: each[place] for name, each in parts.items() if place in each}
            a = np.concatenate([a for a, _, _ in own.values()], axis=-2)
            b = np.concatenate([b.swapaxes(-1, -2) for _, b, _ in own.values()], axis=-2)
            if not a.shape[-2]:  # a head that is parted from the embedding, without an update of its own
                continue
            scalings = np.zeros((1 + len(parts), a.shape[-2]), np.float32)
            first = 0
            for name, (one, _, scaling) in own.items():
                ranks = slice(first, first := first + one.shape[-2])
                scalings[1 + self.names.index(name), ranks] = scaling
            self._scalings[path] = scalings
            split = isinstance(self._leaves[path], PerLayer)
            put = (lambda x: tuple(map(jnp.asarray, x))) if split else jnp.asarray
            self._ab[path] = put(a), put(b)

    @classmethod
    def load(cls, checkpoint: Checkpoint, folders: Mapping[str, str | os.PathLike[str]]) -> Adapters:
        """Reads adapters by name, from their folders or hub ids.

        Warns:
          UserWarning: see `checkpoint.load_adapter`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: an adapter is damaged, is not one of this model, has numbers that are not finite, or changes what
            cannot differ from row to row: DoRA, modules, embeddings or rows of the vocabulary that are stored in full.
        """
        parts: dict[str, dict[str, _Part]] = {}
        for name, folder in folders.items():
            if not name:
                raise ValueError(f"the adapter in {folder} has no name: give it one, name=DIR")
            try:
                lora, adapter = load_adapter(folder, checkpoint.config, checkpoint.params)
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}; or {_REMEDY}") from None
            if lora.dora:
                raise ValueError(f"adapter {name!r} is DoRA, which is not computed for rows of a batch: {_REMEDY}")
            parts[name] = _parts(name, lora, adapter, checkpoint.config.tie_word_embeddings)
        return cls(checkpoint.params, checkpoint.config.tie_word_embeddings, parts)

    def require(self, name: str | None) -> None:
        """Raises ValueError for a name that no adapter has; None is the model itself."""
        if name is not None and name not in self.names:
            known = f"known are {', '.join(self.names)}" if self.names else "there are none"
            raise ValueError(f"there is no adapter {name!r}; {known}")

    def rows(self, names: Sequence[str | None]) -> Params:
        """The parameters for a batch whose rows have these adapters; None is a row of the model itself.

        Raises:
          ValueError: no adapter has such a name.
        """
        leaves = dict(self._leaves)
        for path, scaling in self._scalings_of(tuple(names)).items():
            base, (a, b) = leaves[path], self._ab[path]
            if isinstance(base, PerLayer):
                own = zip(base, a, b, strict=True)
                leaves[path] = PerLayer(tuple(LoraRows(*each, scaling) for each in own))
            else:
                leaves[path] = LoraRows(base, a, b, scaling)
        return flax.traverse_util.unflatten_dict(leaves, sep="/")

    def _scalings_of(self, names: tuple[str | None, ...]) -> dict[str, Any]:
        """By path, float32 [B, R] on the device."""
        if names not in self._kept:
            for name in names:
                self.require(name)
            numbers = [0 if name is None else 1 + self.names.index(name) for name in names]
            self._kept[names] = {path: jnp.asarray(each[numbers]) for path, each in self._scalings.items()}
        self._kept.move_to_end(names)
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[names]


def _parts(name: str, lora: LoraConfig, adapter: Any, is_tied: bool) -> dict[str, _Part]:
    """An adapter's parts by matrix."""
    flat = flax.traverse_util.flatten_dict(adapter, is_leaf=lambda _, value: "a" in value)
    found: dict[str, _Part] = {}
    for path, each in flat.items():
        a, b = (np.asarray(each[part], np.float32) for part in ("a", "b"))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"adapter {name!r} has numbers in {'/'.join(path)} that are not finite: train it again")
        found["/".join(path)] = (a, b, lora.scaling_of(path[-1]))
    if is_tied and TABLE in found:
        # A head of its own for all rows: that of this adapter has the embedding's update only if the two are tied.
        a, b, scaling = found[TABLE]
        found.setdefault(HEAD, (a, b, scaling) if lora.tied else (a[:0], b[:, :0], 1.0))
    return found

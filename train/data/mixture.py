"""Several data sets as one: rows stay within a data set, so that texts of different files never share a row.

Axis letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ..settings import Settings
from .batch import Batch, Pair
from .dataset import Dataset
from .sources import find_files


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of several data sets, one after the other; `len` is their number. How often each comes: order.py.

    Attributes:
      names: of the data sets, as the settings name them.
      parts: the data sets; all have the same sequence length and are of the same kind.
    """

    names: tuple[str, ...]
    parts: tuple[Dataset, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each part."""
        return tuple(map(len, self.parts))

    @property
    def fingerprint(self) -> str:
        """A hash of the rows' contents; that of the part, if there is one only."""
        prints = [part.fingerprint for part in self.parts]
        return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()

    @property
    def lines(self) -> np.ndarray:
        """A hash of each line, uint64 [lines]."""
        return np.concatenate([part.lines for part in self.parts])

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch | Pair:
        """The rows with these indices, in this order: numpy arrays [B, T]. An index of -1 gives a row of padding."""
        if len(self.parts) == 1:
            return self.parts[0].rows(indices)
        starts = list(itertools.accumulate(self.counts, initial=0))
        found = []
        for index in indices:
            part = int(np.searchsorted(starts, max(index, 0), "right")) - 1
            found.append(self.parts[part].rows([index if index == -1 else index - starts[part]]))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def require_different_files(settings: Settings) -> None:
    """Finds the files of a run, or fetches them, before anything else is loaded.

    Raises:
      FileNotFoundError: there is no such file or data set.
      ValueError: a file is named twice, or is both trained on and held out.
    """
    known: dict[int, list[tuple[str, Path]]] = {}  # by size
    for kind, names in (("train_file", settings.train_files), ("eval_file", settings.eval_files)):
        if len(set(names)) < len(names):
            raise ValueError(f"{kind}: names a file twice; mixture=2 has its rows twice in an epoch")
        for name in names:
            for path in find_files(name):
                alike = known.setdefault(path.stat().st_size, [])
                for other, its_path in alike:  # a data set may have a file twice
                    if other != f"{kind} {name}" and filecmp.cmp(path, its_path, shallow=False):
                        raise ValueError(_named_twice(other, f"{kind} {name}"))
                alike.append((f"{kind} {name}", path))


def require_held_out(data: Mixture, held_out: Mixture, settings: Settings) -> None:
    """Raises ValueError if nothing is held out, or just what is trained on."""
    if not len(held_out):
        raise ValueError(
            f"eval_fraction={settings.eval_fraction}: holds out none of the {len(data.lines)} lines of "
            f"{', '.join(data.names)}; raise it, or change the seed"
        )
    for name, part in zip(held_out.names, held_out.parts, strict=True):
        for trained, other in zip(data.names, data.parts, strict=True):
            if part.fingerprint == other.fingerprint:
                raise ValueError(_named_twice(f"train_file {trained}", f"eval_file {name}"))


def _named_twice(one: str, other: str) -> str:
    remedy = "name it once; mixture=2 has its rows twice in an epoch"
    if one.startswith("train_file") and other.startswith("eval_file"):
        remedy = "its loss would not tell what the model can do with other lines; hold lines out with eval_fraction=0.1"
    return f"{one} and {other} are the same: {remedy}"

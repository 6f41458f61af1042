"""In which order rows are trained on: it depends on the seed and the step alone, so a run is resumed by its step.

Axis letters: A accumulated batches, B rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np

from ..settings import Settings, resolved
from .batch import Batch, Pair
from .dataset import Dataset


def batches(dataset: Dataset, settings: Settings, start_step: int = 0) -> Iterator[Batch | Pair]:
    """The batches of the steps from `start_step` on, without end; their leaves are numpy's, [A, B, T].

    Every epoch has every row once, in a new order; a batch may end one epoch and begin the next. With several
    processes, B is this process's share: the batches of all processes, joined along B, are those of a single one.

    Raises:
      ValueError: the batch does not divide into equal shares.
    """
    share = _share(settings)
    step = start_step
    while True:
        rows = rows_of_step(len(dataset), settings, step)[:, share]
        flat = dataset.rows(rows.reshape(-1))
        yield jax.tree.map(lambda leaf: leaf.reshape(*rows.shape, -1), flat)  # noqa: B023 (called at once)
        step += 1


def eval_batches(dataset: Dataset, settings: Settings) -> Iterator[Batch | Pair]:
    """Every row once, in the file's order; leaves [B, T]. The last batch is filled up with rows of padding.

    Shares and errors as in `batches`.
    """
    share = _share(settings)
    size = resolved(settings).batch_size
    for begin in range(0, len(dataset), size):
        rows = np.arange(begin, begin + size)
        yield dataset.rows(np.where(rows < len(dataset), rows, -1)[share])


def rows_of_step(count: int, settings: Settings, step: int) -> np.ndarray:
    """Which of `count` rows a step is given, over all processes: int64 [A, B]."""
    s = resolved(settings)
    each = s.accumulation * s.batch_size
    places = np.arange(step * each, (step + 1) * each)
    rows = [_shuffled(count, settings.seed, int(place // count))[place % count] for place in places]
    return np.array(rows).reshape(s.accumulation, s.batch_size)


@functools.lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, int64 [count]: rows sorted by random numbers.

    numpy guarantees the same numbers of Philox (Salmon et al., SC 2011) in all versions, but not the same shuffles.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(keys, kind="stable")


def _share(settings: Settings) -> slice:
    processes, rows = jax.process_count(), resolved(settings).batch_size
    if rows % processes:
        raise ValueError(f"batch_size={rows} does not divide among {processes} processes")
    size = rows // processes
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

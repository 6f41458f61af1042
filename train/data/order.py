"""In which order rows are trained on: it depends on the seed and the step alone, so a run is resumed by its step.

An epoch has the rows of each file as often as the mixture says, in a new order. Of a file that it has 0.5 times, one
epoch has half of the rows and the next the other half; then comes another pass over that file, with other halves.

Axis letters: A accumulated batches, B rows, T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import jax
import numpy as np

from ..settings import Settings, resolved
from .batch import Batch, Pair
from .dataset import Dataset
from .mixture import Mixture

_EPOCH, _EVALUATION = -2, -1  # streams of random numbers; those of files are numbered from 0


def batches(dataset: Dataset | Mixture, settings: Settings, start_step: int = 0) -> Iterator[Batch | Pair]:
    """The batches of the steps from `start_step` on, without end; their leaves are numpy's, [A, B, T].

    A batch may end one epoch and begin the next. With several processes, B is this process's share: the batches of all
    processes, joined along B, are those of a single one.

    Raises:
      ValueError: the batch does not divide into equal shares.
    """
    share = _share(settings)
    step = start_step
    while True:
        rows = rows_of_step(dataset.counts, settings, step)[:, share]
        flat = dataset.rows(rows.reshape(-1))
        yield jax.tree.map(lambda leaf: leaf.reshape(*rows.shape, -1), flat)  # noqa: B023 (called at once)
        step += 1


def eval_batches(dataset: Dataset | Mixture, settings: Settings) -> Iterator[Batch | Pair]:
    """Every row once, in the files' order, or `eval_rows` of them; leaves [B, T].

    The last batch is filled up with rows of padding. Shares and errors as in `batches`.
    """
    share = _share(settings)
    chosen, size = rows_of_evaluation(len(dataset), settings), resolved(settings).batch_size
    for begin in range(0, len(chosen), size):
        rows = chosen[begin : begin + size]
        yield dataset.rows(np.pad(rows, (0, size - len(rows)), constant_values=-1)[share])


def rows_of_evaluation(count: int, settings: Settings) -> np.ndarray:
    """Which of `count` rows are evaluated, ascending: the same at each evaluation."""
    if not 0 < settings.eval_rows < count:
        return np.arange(count)
    return np.sort(_random_order(count, settings.seed, 0, _EVALUATION)[: settings.eval_rows])


def epoch_size(counts: Sequence[int], settings: Settings) -> Fraction:
    """How many rows an epoch has, of files with so many rows: the mean, as parts of rows are left to the next epoch."""
    return sum((count * times for count, times in zip(counts, _times(counts, settings), strict=True)), Fraction())


def rows_of_step(counts: Sequence[int], settings: Settings, step: int) -> np.ndarray:
    """Which rows a step is given, over all processes, of files with `counts` rows: int64 [A, B]."""
    s = resolved(settings)
    each = s.accumulation * s.batch_size
    counts, times = tuple(counts), _times(counts, settings)
    rows: list[int] = []
    epoch = math.floor(step * each / epoch_size(counts, settings))  # it begins there or before
    while len(rows) < each:
        first, order = _begin(counts, times, epoch), _epoch(counts, times, settings.seed, epoch)
        at = step * each + len(rows) - first
        rows += order[at : at + each - len(rows)].tolist()
        epoch += 1
    return np.array(rows).reshape(s.accumulation, s.batch_size)


def _times(counts: Sequence[int], settings: Settings) -> tuple[Fraction, ...]:
    """The mixture as exact numbers."""
    return tuple(Fraction(str(times)) for times in settings.mixture or (1,) * len(counts))


def _begin(counts: Sequence[int], times: Sequence[Fraction], epoch: int) -> int:
    """How many rows all epochs before this one have."""
    return sum(math.floor(count * each * epoch) for count, each in zip(counts, times, strict=True))


@functools.lru_cache(maxsize=2)
def _epoch(counts: tuple[int, ...], times: tuple[Fraction, ...], seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, in its order."""
    rows, first = [np.zeros(0, np.int64)], 0
    for file, (count, each) in enumerate(zip(counts, times, strict=True)):
        begin, end = (math.floor(count * each * border) for border in (epoch, epoch + 1))
        while begin < end:  # the file's rows, pass after pass without end; the epoch has those in [begin, end)
            number, at = divmod(begin, count)
            until = min(count, at + end - begin)
            some = np.arange(count)
            if until - at < count:
                some = np.sort(_random_order(count, seed, number, file)[at:until])
            rows.append(first + some)
            begin += until - at
        first += count
    together = np.concatenate(rows)
    return together[_random_order(len(together), seed, epoch, _EPOCH)]


def _random_order(count: int, seed: int, number: int, stream: int) -> np.ndarray:
    """A permutation, int64 [count], by random numbers; those of other streams have nothing to do with one another.

    numpy guarantees the same numbers of Philox (Salmon et al., SC 2011) in all versions, but not the same shuffles.
    """
    keys = np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream + 2]).random_raw(count)
    return np.argsort(keys, kind="stable")


def _share(settings: Settings) -> slice:
    processes, rows = jax.process_count(), resolved(settings).batch_size
    if rows % processes:
        raise ValueError(f"batch_size={rows} does not divide among {processes} processes")
    size = rows // processes
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

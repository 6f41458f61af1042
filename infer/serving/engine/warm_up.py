"""Compiles every program that an engine can need, by running each for a moment with a row of its own.

Those that do not need one another's are compiled at the same time: a compiler uses little more than one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...engine.buckets import piece_length
from .batch import PATIENCE, Batch, Way
from .jobs import Job
from .options import EngineOptions, Sizes, most_guessed
from .prefixes import Prefixes
from .reader import Reader
from .sequence import Row

Params = Callable[[Sequence[Row | None]], Any]
Program = Callable[[], object]

_MOST_AT_ONCE = 4  # each takes some hundred MB


def run_all(together: Sequence[Program], then: Sequence[Program], told: Callable[[int, int], None]) -> None:
    """Runs programs, the first ones in several threads; `told` hears how many of how many are done.

    What one of them raises, or `told` does, is raised when those that were begun have ended.
    """
    of = len(together) + len(then)
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            for done, ended in enumerate(as_completed([pool.submit(program) for program in together]), 1):
                ended.result()
                told(done, of)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for done, program in enumerate(then, len(together) + 1):
        program()
        told(done, of)


class Programs:
    """Those of an engine; `params` are the weights for rows."""

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, options: EngineOptions, params: Params):
        self._checkpoint, self._sizes, self._options, self._params = checkpoint, sizes, options, params

    def together(self) -> list[Program]:
        """No two of them run the same program; what takes longest comes first."""
        programs: list[Program] = [partial(self._write, rung) for rung in self._sizes.rungs]
        programs.append(partial(self._read, 1, picks=True))
        for echo in (True, False):
            lengths = pieces(self._sizes)[0 if echo else 1 :]  # the shortest is that of one token
            programs += [partial(self._read, length, echo) for length in lengths]
        return programs

    def then(self) -> list[Program]:
        """Those that run others, too: a beginning that is known, and rows that are moved."""
        return [self._reuse, self._move] if self._sizes.prefix_bytes else [self._move]

    def _row(self, length: int = 1, echo: bool = False) -> Row:
        job = Job([0] * min(length, self._sizes.room - 1), self._sizes.room, logprobs=0 if echo else None, echo=echo)
        return Row.of(job, lambda piece: None, self._checkpoint, self._sizes)

    def _read(self, length: int, echo: bool = False, picks: bool = False, prefixes: Prefixes | None = None) -> None:
        row = self._row(length, echo)
        reader = Reader(self._checkpoint, self._sizes, row, prefixes)
        while not reader.is_over:
            reader.read_piece(self._params([row]))
        if picks:
            reader.answer(self._params([row]), row)
            Reader(self._checkpoint, self._sizes, row, memory=reader.cache)

    def _write(self, rung: int) -> None:
        """All ways of a number of rows, of which one is used."""
        batch = self._batch()
        batch.join(row := self._row(), self._nothing(), rung)
        # What "grammar" runs is what "plain" does, with other data.
        ways: tuple[Way, ...] = ("plain",)
        if self._options.speculate > 0 and rung <= most_guessed(self._options, self._sizes):
            ways = ("plain", "guesses")
        for way in ways:
            batch.write(self._params(batch.rows), 1, way)
        batch.leave(row)
        batch.write(self._params(batch.rows), 1)
        batch.settle()

    def _reuse(self) -> None:
        """Keys and values are copied out of a cache, and into one."""
        prefixes = Prefixes(self._sizes.chunk, self._sizes.prefix_bytes)
        for _ in range(2):
            self._read(self._sizes.chunk + 1, prefixes=prefixes)

    def _move(self) -> None:
        """Rows come until the last number of rows is needed, and go again."""
        batch, nothing = self._batch(), self._nothing()
        for _ in range(self._sizes.rungs[-1]):
            batch.join(self._row(), nothing)
        while batch.used:
            batch.leave(batch.used[-1])
            for _ in range(PATIENCE + 1):
                batch.shrink()

    def _batch(self) -> Batch:
        return Batch(self._checkpoint, self._sizes, self._options)

    def _nothing(self) -> KVCache:
        """The cache of a row of which nothing has been read."""
        sizes = self._sizes
        return KVCache.create(self._checkpoint.config, 1, sizes.capacity, sizes.dtype, unset=True)


def pieces(sizes: Sizes) -> list[int]:
    """The lengths that prompts are read in."""
    return sorted({piece_length(left, 1, sizes.chunk, sizes.capacity) for left in range(1, sizes.chunk + 1)})

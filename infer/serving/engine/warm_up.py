"""Compiles every program that an engine can need, by running each for a moment with rows of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...engine.buckets import piece_length
from .batch import Batch, Way
from .jobs import Job
from .options import EngineOptions, Sizes
from .prefixes import Prefixes
from .reader import Reader
from .sequence import Row

Params = Callable[[Sequence[Row | None]], Any]


def pieces(sizes: Sizes) -> list[int]:
    """The lengths that prompts are read in."""
    return sorted({piece_length(left, 1, sizes.chunk, sizes.capacity) for left in range(1, sizes.chunk + 1)})


def programs(checkpoint: Checkpoint, sizes: Sizes, options: EngineOptions, params: Params) -> Iterator[None]:
    """Runs the programs one after another; `params` are the weights for rows."""
    for echo in (False, True):
        for length in pieces(sizes):
            _read(checkpoint, sizes, params, min(length, sizes.room - 1), echo)
            yield
    if sizes.prefix_bytes:
        prefixes = Prefixes(sizes.chunk, sizes.prefix_bytes)
        for _ in range(2):  # keys and values are copied out of a cache, and into one
            _read(checkpoint, sizes, params, sizes.chunk + 1, False, prefixes)
        yield
    yield from _written(checkpoint, sizes, options, params)


def count(sizes: Sizes, options: EngineOptions) -> int:
    """How many steps `programs` has."""
    ways = sum(1 + _guesses(options, rung) for rung in sizes.rungs)
    return 2 * len(pieces(sizes)) + (sizes.prefix_bytes > 0) + ways + len(sizes.rungs)


def _read(
    checkpoint: Checkpoint, sizes: Sizes, params: Params, length: int, echo: bool, prefixes: Prefixes | None = None
) -> tuple[Row, Reader]:
    job = Job([0] * length, sizes.room, logprobs=0 if echo else None, echo=echo)
    row = Row.of(job, lambda piece: None, checkpoint, sizes)
    reader = Reader(checkpoint, sizes, row, prefixes)
    while not reader.is_over:
        reader.read_piece(params([row]))
    reader.answer(params([row]), row)
    return row, reader


def _written(checkpoint: Checkpoint, sizes: Sizes, options: EngineOptions, params: Params) -> Iterator[None]:
    """All rungs, up and down."""
    batch = Batch(checkpoint, sizes, options)
    memory: KVCache | None = None
    for rung in sizes.rungs:
        while len(batch.used) < rung:
            job = Job([0], sizes.room)
            row = Row.of(job, lambda piece: None, checkpoint, sizes)
            reader = Reader(checkpoint, sizes, row, memory=memory)
            reader.read_piece(params([row]))
            reader.answer(params([row]), row)
            batch.join(row, reader.cache)
            memory = reader.cache
        # What "grammar" runs is what "plain" does, with other data.
        ways: tuple[Way, ...] = ("plain", "guesses") if _guesses(options, rung) else ("plain",)
        for way in ways:
            batch.write(params(batch.rows), 1, way)
            yield
    for rung in reversed(sizes.rungs):
        while len(batch.used) > rung:
            batch.leave(batch.used[-1])
        while len(batch.rows) > rung:
            batch.shrink()
        batch.settle()
        yield


def _guesses(options: EngineOptions, rung: int) -> bool:
    return options.speculate > 0 and rung <= options.speculate_rows

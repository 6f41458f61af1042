"""How an engine is set up, and the sizes of its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import slots_needed

from ...engine.buckets import batch_rung, own_cache_dtype
from ...engine.options import CACHE_DTYPES, MOST_TOKENS


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up. Raises ValueError for values that make no sense.

    Attributes:
      slots: how many answers are written at a time.
      room: the most tokens, prompt and answer together, of a job; at most the model's context.
      queue: how many jobs may wait for a slot.
      readers: how many prompts are read at a time, a piece of one after a piece of another.
      chunk: prompts are read in pieces that begin at multiples of this; None: 128 on the CPU, 512 elsewhere.
      cache_dtype: of the keys and values; by default `buckets.own_cache_dtype`.
      top_logprobs: the most of `Job.logprobs`.
    """

    slots: int = 8
    room: int = 4096
    queue: int = 256
    readers: int = 4
    chunk: int | None = None
    cache_dtype: str | None = None
    top_logprobs: int = 20

    def __post_init__(self) -> None:
        for name in ("slots", "room", "readers", "chunk"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= MOST_TOKENS:
                raise ValueError(f"{name}={value} must be at least 1 and at most {MOST_TOKENS}")
        if self.queue < 0 or self.top_logprobs < 0:
            raise ValueError(f"queue={self.queue} and top_logprobs={self.top_logprobs} must be at least 0")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={self.cache_dtype!r} is not one of {CACHE_DTYPES}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of an engine's arrays.

    Attributes:
      room: M, tokens of a row.
      capacity: S, slots of a row's cache.
      chunk: see `EngineOptions`.
      rungs: the numbers of rows B that answers are written with, rising.
      dtype: of the cache.
    """

    room: int
    capacity: int
    chunk: int
    rungs: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: EngineOptions) -> Sizes:
        """The sizes for a model."""
        config = checkpoint.config
        chunk = options.chunk or (128 if jax.default_backend() == "cpu" else 512)
        room = min(options.room, config.max_position_embeddings)
        dtype = own_cache_dtype(checkpoint) if options.cache_dtype is None else jnp.dtype(options.cache_dtype)
        rungs = sorted({batch_rung(rows) for rows in range(1, options.slots + 1)})
        return cls(room, slots_needed(config, room, chunk), min(chunk, room), tuple(rungs), dtype)

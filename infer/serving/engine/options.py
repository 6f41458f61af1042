"""How an engine is set up, and the sizes of its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.kernels import has_packed
from phi3_jax.model import slots_needed

from ...engine.buckets import batch_rung, own_cache_dtype, slot_bytes
from ...engine.options import CACHE_DTYPES, MOST_TOKENS
from ...engine.speculation import MOST_GUESSES

MOST_STEPS = 32  # of a call; `News` has room for so many tokens of a row


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up. Raises ValueError for values that make no sense.

    Attributes:
      slots: how many answers are written at a time.
      room: the most tokens, prompt and answer together, of a job; at least 2, at most the model's context.
      queue: how many jobs may wait for a slot.
      readers: how many prompts are read at a time, a piece of one after a piece of another.
      chunk: prompts are read in pieces that begin at multiples of this; None: 128 on the CPU, 512 elsewhere.
      cache_dtype: of the keys and values; by default `buckets.own_cache_dtype`.
      top_logprobs: the most of `Job.logprobs`.
      prefix_bytes: the most memory for keys and values of prompts' beginnings, which are not read twice; 0: none.
      speculate: guess so many tokens at a time from what the text says already, which changes no token; 0: none.
      speculate_rows: but only while at most so many answers are written.
      most_biases, most_listed: the most entries of a job's logit_bias, and of its lists of banned or forced tokens:
        arrays have one size.
    """

    slots: int = 8
    room: int = 4096
    queue: int = 256
    readers: int = 4
    chunk: int | None = None
    cache_dtype: str | None = None
    top_logprobs: int = 20
    prefix_bytes: int = 1 << 30
    speculate: int = 0
    speculate_rows: int = 2
    most_biases: int = 1024
    most_listed: int = 64

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("room", 2), ("readers", 1), ("chunk", 1)):
            if (value := getattr(self, name)) is not None and not least <= value <= MOST_TOKENS:
                raise ValueError(f"{name}={value} must be at least {least} and at most {MOST_TOKENS}")
        for name in (
            "queue",
            "top_logprobs",
            "prefix_bytes",
            "speculate",
            "speculate_rows",
            "most_biases",
            "most_listed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.speculate > MOST_GUESSES:
            raise ValueError(f"speculate={self.speculate} must be at most {MOST_GUESSES}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={self.cache_dtype!r} is not one of {CACHE_DTYPES}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of an engine's arrays.

    Attributes:
      room: the most tokens of a row.
      width: M, those and guesses behind them.
      at_once: the most tokens of a row that one call writes.
      capacity: S, slots of a row's cache, a multiple of `chunk`.
      chunk: see `EngineOptions`.
      rungs: the numbers of rows B that answers are written with, rising.
      dtype: of the cache.
      top_logprobs: how many likely tokens are recorded, where any are.
      prefix_bytes: see `EngineOptions`; 0 if no prompt has room for a chunk and its last token.
      most_biases, most_listed: see `EngineOptions`.
      border: LongRoPE's: longer rows have the long factors; None without.
    """

    room: int
    width: int
    at_once: int
    capacity: int
    chunk: int
    rungs: tuple[int, ...]
    dtype: Any
    top_logprobs: int
    prefix_bytes: int
    most_biases: int
    most_listed: int
    border: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: EngineOptions) -> Sizes:
        """The sizes for a model. Raises ValueError for a prefix cache that would hold nothing."""
        config, guesses = checkpoint.config, options.speculate
        room = min(options.room, config.max_position_embeddings)
        chunk = min(options.chunk or (128 if jax.default_backend() == "cpu" else 512), room)
        dtype = own_cache_dtype(checkpoint) if options.cache_dtype is None else jnp.dtype(options.cache_dtype)
        prefix_bytes = options.prefix_bytes if room > chunk + 1 else 0
        if 0 < prefix_bytes < (least := chunk * slot_bytes(config, dtype)):
            raise ValueError(
                f"prefix_bytes={prefix_bytes} is less than the {least} bytes of one chunk of {chunk} tokens: make it "
                "larger, or 0 for no prefix cache"
            )
        rungs = {batch_rung(rows) for rows in range(1, options.slots + 1)}
        if jax.default_backend() == "cpu" and not has_packed(checkpoint.params):
            # XLA multiplies a row alone in another way than several, which would change its bits.
            rungs = {max(2, rung) for rung in rungs}
        slots = slots_needed(config, room + guesses, max(chunk, guesses + 2))
        return cls(
            room=room,
            width=room + guesses,
            at_once=MOST_STEPS * (1 + guesses),
            capacity=-(-slots // chunk) * chunk,
            chunk=chunk,
            rungs=tuple(sorted(rungs)),
            dtype=dtype,
            top_logprobs=min(options.top_logprobs, config.vocab_size),
            prefix_bytes=prefix_bytes,
            most_biases=options.most_biases,
            most_listed=options.most_listed,
            border=None if config.long_rope is None else config.long_rope.original_max_position_embeddings,
        )


def most_guessed(options: EngineOptions, sizes: Sizes) -> int:
    """The most rows B of a batch in which tokens are guessed: the smallest is always one."""
    return max(options.speculate_rows, sizes.rungs[0])

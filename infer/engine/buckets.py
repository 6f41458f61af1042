"""The sizes of a run's arrays: lengths are rounded up, so that few programs are compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint, is_quantized
from phi3_jax.kernels.attention import why_not_cpu

from .options import Options

_SMALLEST_BUCKET = 16  # tokens
_ROOM_UNIT = 128  # tokens


def room_for(longest: int, limit: int, options: Options) -> int:
    """M: how many tokens, prompt and answer together, a row has memory for.

    Args:
      longest: tokens of the longest prompt.
      limit: the most new tokens of a row.
    """
    chunk = options.prefill_chunk
    padded = padded_length(longest, chunk) if longest <= chunk else _round_up(longest, chunk)
    # Guesses may go past the answer's end.
    return max(padded + _round_up(limit, _ROOM_UNIT), options.room) + options.guesses


def padded_length(tokens: int, chunk: int) -> int:
    """The length that a piece of a prompt is padded to: a power of two, but at most the chunk."""
    return min(chunk, max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()))


def piece_length(tokens: int, chunk: int, capacity: int) -> int:
    """The length that the next piece is padded to, when `tokens` are still to be read.

    Rows that are read again are longer than their prompts were: their padding must not exceed the cache.
    """
    return min(padded_length(tokens, chunk), capacity)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def own_cache_dtype(checkpoint: Checkpoint) -> Any:
    """The default dtype of the cache: bfloat16 for quantised weights, else the weights' own.

    On the CPU without kernels it is float32, because XLA converts a whole bfloat16 cache to float32 to write to it.
    """
    params = checkpoint.params
    if jax.default_backend() == "cpu" and why_not_cpu("bfloat16") is not None:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16) if is_quantized(params) else params["embed_tokens"]["weight"].dtype

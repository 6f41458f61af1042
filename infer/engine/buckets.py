"""How much memory a run makes room for: lengths are rounded up, so that few programs are compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.checkpoint.quantized_files import is_quantized
from phi3_jax.kernels.attention import why_not_cpu

from .options import Options

_SMALLEST_BUCKET = 16  # tokens
_ROOM_UNIT = 128  # tokens


def room_for(longest: int, limit: int, options: Options) -> int:
    """How many tokens of a row there is memory for: M.

    Args:
      longest: tokens of the longest prompt.
      limit: the most new tokens of a row.
    """
    chunk = options.prefill_chunk
    padded = padded_length(longest, chunk) if longest <= chunk else _round_up(longest, chunk)
    # Guesses may go past the answer's end.
    return max(padded + _round_up(limit, _ROOM_UNIT), options.room) + options.guesses


def padded_length(tokens: int, chunk: int) -> int:
    """The length that a piece of a prompt is padded to: a power of two, the chunk at most."""
    return min(chunk, max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()))


def piece_length(tokens: int, chunk: int, capacity: int) -> int:
    """The length that the next piece of what is still to be read is padded to; `tokens` are left.

    Rows that are read again have grown past what was their prompt: their padding must not exceed the cache.
    """
    return min(padded_length(tokens, chunk), capacity)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def own_cache_dtype(checkpoint: Checkpoint) -> Any:
    """bfloat16 where weights are kept in fewer bits than float32, else the weights' own.

    Without kernels it is float32 on the CPU, where XLA turns all of a bfloat16 cache into float32 to write to it.
    """
    params = checkpoint.params
    if jax.default_backend() == "cpu" and why_not_cpu("bfloat16") is not None:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16) if is_quantized(params) else params["embed_tokens"]["weight"].dtype

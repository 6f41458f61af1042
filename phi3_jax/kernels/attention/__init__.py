"""Attention over keys and values as they lie in the cache.

Axis letters: L layer, B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from phi3_jax.kernels.attention import cpu, xla
from phi3_jax.kernels.attention.arguments import Context, Keys
from phi3_jax.kernels.dispatch import on_cpu
from phi3_jax.kernels.native.build import Unavailable, library

Implementation = Literal["xla", "cpu"]


def attention(q: jax.Array, keys: Keys, context: Context, implementation: Implementation | None = None) -> jax.Array:
    """Scaled dot-product attention; G query heads share a key-value head, which is never repeated in memory.

    Args:
      q: [B, T, N, H].
      keys: the keys and values.
      context: who sees whom. What a query that sees no key (padding) gets is finite, and means nothing.
      implementation: "cpu" is the compiled kernels; "xla" runs everywhere, and can be differentiated. None takes the
        kernels where a program is compiled for the CPU and they can be used, else XLA (`kernels.status` tells).

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: `implementation` is "cpu" and the keys are of a type that the kernels do not read.
      Unavailable: `implementation` is "cpu" and there is no library of kernels.
    """
    if implementation == "xla":
        return xla.attention(q, keys, context)[0]
    reason = why_not_cpu(keys.k.dtype)
    if reason is not None:
        if implementation == "cpu":
            raise reason
        return xla.attention(q, keys, context)[0]
    if implementation == "cpu":
        return cpu.attention(q, keys, context)
    return on_cpu(cpu.attention, lambda *arguments: xla.attention(*arguments)[0])(q, keys, context)


def why_not_cpu(dtype: jax.typing.DTypeLike) -> ValueError | Unavailable | None:
    """Why the CPU kernels cannot read keys and values of this dtype; None if they can."""
    if jnp.dtype(dtype) not in cpu.CACHE_DTYPES:
        return ValueError(f"the CPU kernels read keys of {cpu.CACHE_DTYPES}, not {jnp.dtype(dtype)}")
    loaded = library()
    return loaded if isinstance(loaded, Unavailable) else None

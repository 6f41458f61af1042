"""Attention over keys and values in the layout of the cache.

Axis letters: L layer, B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Literal

import jax

from phi3_jax.kernels.attention import blockwise, cpu, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.dispatch import on_cpu
from phi3_jax.kernels.native.build import why_unavailable

Implementation = Literal["xla", "cpu"]


def attention(
    q: jax.Array, kv: KeysValues, visible: Visibility, implementation: Implementation | None = None
) -> jax.Array:
    """Scaled dot-product attention; G query heads share a key-value head, which is never repeated in memory.

    Args:
      q: [B, T, N, H].
      kv: the keys and values.
      visible: which keys each query may see. The output of a query that sees none (padding) is finite but meaningless.
      implementation: "cpu" is the compiled kernels; "xla" runs everywhere, and can be differentiated. None takes the
        kernels where a program is compiled for the CPU and they can be used, else XLA (see `kernels.status`), which
        then computes many scores in blocks.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: `implementation` is "cpu" and the keys are of a type that the kernels do not read.
      Unavailable: `implementation` is "cpu" and the kernels cannot be used here.
    """
    if implementation == "cpu":
        return cpu.attention(q, kv, visible)
    if implementation == "xla":
        return xla.attention(q, kv, visible)[0]
    if why_not_cpu(kv.k.dtype):
        return _by_xla(q, kv, visible)
    return on_cpu(cpu.attention, _by_xla)(q, kv, visible)


def _by_xla(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """All scores at once where they are few, else blocks of them."""
    if blockwise.is_large(q, kv.k.shape[-2]):
        return blockwise.cached(q, kv, visible)
    return xla.attention(q, kv, visible)[0]


def why_not_cpu(dtype: jax.typing.DTypeLike) -> str | None:
    """Why the CPU kernels cannot read keys and values of this dtype; None if they can."""
    return cpu.why_not_dtype(dtype) or why_unavailable()

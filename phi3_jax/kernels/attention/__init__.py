"""Attention over keys and values in the layout of the cache.

Axis letters: L layer, B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Literal

import jax

from phi3_jax.kernels.attention import blockwise, cpu, cuda, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.native.build import why_unavailable

Implementation = Literal["xla", "cpu", "cuda", "tpu"]


def attention(
    q: jax.Array, kv: KeysValues, visible: Visibility, implementation: Implementation | None = None
) -> jax.Array:
    """Scaled dot-product attention; G query heads share a key-value head, which is never repeated in memory.

    Args:
      q: [B, T, N, H].
      kv: the keys and values.
      visible: which keys each query may see. The output of a query that sees none (padding) is finite but meaningless.
      implementation: "cpu", "cuda" and "tpu" are the kernels for these platforms; "xla" runs everywhere, and can be
        differentiated. None takes the kernels of the platform that a program is compiled for, if they can be used, else
        XLA (see `kernels.status`), which then computes many scores in blocks.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: `implementation` names kernels, which do not read keys of this type or size.
      Unavailable: `implementation` names kernels, which cannot be used here.
    """
    if implementation == "cpu":
        return cpu.attention(q, kv, visible)
    if implementation == "cuda":
        return cuda.attention(q, kv, visible)
    if implementation == "tpu":
        return _by_tpu(q, kv, visible)
    if implementation == "xla":
        return xla.attention(q, kv, visible)
    by_cpu = cpu.attention if why_not_cpu(kv.k.dtype) is None else None
    by_cuda = cuda.attention if cuda.why_not(kv.k.dtype, q.shape[-1]) is None else None
    return by_platform(_by_xla, cpu=by_cpu, cuda=by_cuda, tpu=_by_tpu)(q, kv, visible)


def _by_xla(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """All scores at once where they are few, else blocks of them."""
    if blockwise.is_large(q, kv.k.shape[-2]):
        return blockwise.cached(q, kv, visible)
    return xla.attention(q, kv, visible)


def why_not_cpu(dtype: jax.typing.DTypeLike) -> str | None:
    """Why the CPU kernels do not read keys and values of this dtype here; None if they do."""
    if (platform := jax.default_backend()) != "cpu":  # their compiler is not to be started there
        return f"this process computes on a {platform}"
    return cpu.why_not_dtype(dtype) or why_unavailable()


def why_not_kernels(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    """Why no kernels read keys and values of this dtype and size on `jax.default_backend()`; None if some do."""
    if jax.default_backend() == "gpu":
        return cuda.why_not(dtype, head_dim)
    return None if jax.default_backend() == "tpu" else why_not_cpu(dtype)


def _by_tpu(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    from phi3_jax.kernels.attention import tpu  # Pallas: the other platforms' programs need not wait for its import

    return tpu.attention(q, kv, visible)

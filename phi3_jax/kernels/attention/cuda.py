"""The kernels for NVIDIA cards: they read the slots that a query sees, once, and never store a prompt's scores.

Axis letters: L layer, B batch, T new token, S slot, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.cpu import CACHE_DTYPES, index, segments, stacked
from phi3_jax.kernels.cuda.build import library, why_unavailable

Array = jax.Array | jax.ShapeDtypeStruct
HEAD_DIMS = (64, 96, 128)
_BLOCKS = 512  # of threads, that keep a card's memory busy: 4 for each of an A100's or H100's multiprocessors
_SLOTS = 128  # that are worth a block
_LARGEST_SPLIT = 64
_FEW_ROWS = 8  # attention.h: kFewRows


def attention(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """See `kernels.attention`; queries of other types than float32 and bfloat16 are rounded to bfloat16."""
    if (reason := why_not_types(kv.k.dtype, q.shape[-1])) is not None:
        raise ValueError(reason)
    library()  # raises Unavailable
    given = q if q.dtype in (jnp.float32, jnp.bfloat16) else q.astype(jnp.bfloat16)
    call = jax.ffi.ffi_call(
        "phi3_cuda_attention",
        [jax.ShapeDtypeStruct(q.shape, given.dtype), *_scratch(q, kv.k)],
        vmap_method="sequential",
    )
    out, *_ = call(given, *stacked(kv), *_sight(visible), index(kv.layer), **_attributes(q, kv, visible))
    return out.astype(q.dtype)


def attend_new(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, kv: KeysValues, visible: Visibility
) -> tuple[jax.Array, KeysValues]:
    """Rotates new queries and keys, stores the keys and values in place, and attends: two launches.

    Args:
      qkv: [B, T, N + 2K, H]: the heads of queries, of keys and of values, not rotated yet.
      cos, sin: [B, T, R] as for `model.rope.rotate`.
      kv: the cache, a stack indexed by `layer`.
      visible: `q_positions` say where the new keys are stored, as in `write`; `k_positions` have them already.

    Returns:
      ([B, T, N, H] in qkv's dtype, the cache).
    """
    library()  # raises Unavailable
    B, T, heads, H = qkv.shape
    dtype = qkv.dtype if qkv.dtype in (jnp.float32, jnp.bfloat16) else jnp.dtype(jnp.bfloat16)
    q = jax.ShapeDtypeStruct((B, T, heads - 2 * kv.k.shape[-3], H), dtype)
    stacks = stacked(kv)
    call = jax.ffi.ffi_call(
        "phi3_cuda_attend_new",
        [*(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in stacks), q, q, *_scratch(q, kv.k)],
        input_output_aliases={i: i for i in range(len(stacks))},
        vmap_method="sequential",
    )
    new = [each.astype(dtype) for each in (qkv, cos, sin)]
    k, v, k_scale, v_scale, out, *_ = call(
        *stacks, *new, *_sight(visible), index(kv.layer), **_attributes(q, kv, visible)
    )
    scales = {} if kv.k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    return out.astype(qkv.dtype), KeysValues(k, v, layer=kv.layer, **scales)


def _sight(visible: Visibility) -> list[jax.Array]:
    return [visible.q_positions, visible.k_positions, *segments(visible)]


def _attributes(q: Array, kv: KeysValues, visible: Visibility) -> dict[str, np.int64]:
    return {"window": np.int64(visible.window or 0), "splits": np.int64(splits(q, kv.k))}


def _scratch(q: Array, k: Array) -> list[jax.ShapeDtypeStruct]:
    """Results that only the kernels use: what each part of the slots has found, and which of them are done."""
    B, T, N, H = q.shape
    parts = splits(q, k)
    partials = (B * N * T, parts, H + 2) if parts > 1 else (0,)
    return [jax.ShapeDtypeStruct(partials, jnp.float32), jax.ShapeDtypeStruct(partials[:1], jnp.int32)]


def splits(q: Array, k: Array) -> int:
    """Into how many parts the slots are split, so that a few queries [B, T, N, H] keep a card busy; k as in KeysValues.

    On tensor cores, which take over beyond some rows, a block has more of them.
    """
    (B, T, N, _), (K, S) = q.shape, k.shape[-3:-1]
    rows = T * (N // K)
    many = rows > _FEW_ROWS and k.dtype != jnp.float32
    blocks = B * K * -(-rows // (64 if many else 4))
    wanted, slots = (_BLOCKS // 2, 2 * _SLOTS) if many else (_BLOCKS, _SLOTS)
    return max(1, min(wanted // max(blocks, 1), -(-S // slots), _LARGEST_SPLIT))


def why_not_types(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    """Why the kernels cannot read keys and values of this dtype and size; None if they can."""
    if jnp.dtype(dtype) not in CACHE_DTYPES:
        return f"the kernels for NVIDIA cards read keys of {CACHE_DTYPES}, not {jnp.dtype(dtype)}"
    if head_dim not in HEAD_DIMS:
        return f"the kernels for NVIDIA cards are made for heads of {HEAD_DIMS}, not {head_dim}"
    return None


def why_not(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    """Why the kernels do not read keys and values of this dtype and size here; None if they do."""
    if jax.default_backend() != "gpu":  # their compilers are not to be started there
        return "this process does not compute on a GPU"
    return why_not_types(dtype, head_dim) or why_unavailable()


def write(kv: KeysValues, positions: jax.Array, k: jax.Array, v: jax.Array) -> KeysValues:
    """Stores new keys and values [B, T, K, H] of one layer in the slots of their positions [B, T], in place.

    The token at position p goes to slot p mod S, of several the one with the latest position; tokens at negative
    positions (padding) are not stored.
    """
    library()  # raises Unavailable
    stacks = stacked(kv)
    call = jax.ffi.ffi_call(
        "phi3_cuda_cache_write",
        [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in stacks],
        input_output_aliases={i: i for i in range(len(stacks))},
        vmap_method="sequential",
    )
    if not (k.dtype == v.dtype and k.dtype in (jnp.float32, jnp.bfloat16)):
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    k, v, k_scale, v_scale = call(*stacks, k, v, positions, index(kv.layer))
    if kv.k_scale is None:
        return KeysValues(k, v, layer=kv.layer)
    return KeysValues(k, v, k_scale, v_scale, kv.layer)

"""The CPU kernels: they read keys and values once, block by block, and never store the scores of a whole prompt.

Axis letters: L layer, B batch, T new token, S slot, K key-value heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.native.build import library

CACHE_DTYPES = ("float32", "bfloat16", "int8")


def attention(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """See `kernels.attention`."""
    if (reason := why_not_dtype(kv.k.dtype)) is not None:
        raise ValueError(reason)
    library()  # raises Unavailable
    call = jax.ffi.ffi_call("phi3_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential")
    out = call(
        q.astype(jnp.float32),
        *stacked(kv),
        visible.q_positions,
        visible.k_positions,
        *segments(visible),
        index(kv.layer),
        window=np.int64(visible.window or 0),
    )
    return out.astype(q.dtype)


def why_not_dtype(dtype: jax.typing.DTypeLike) -> str | None:
    """Why the kernels cannot read keys and values of this dtype; None if they can."""
    known = jnp.dtype(dtype) in CACHE_DTYPES
    return None if known else f"the CPU kernels read keys of {CACHE_DTYPES}, not {jnp.dtype(dtype)}"


def write(kv: KeysValues, positions: jax.Array, k: jax.Array, v: jax.Array) -> KeysValues:
    """Stores new keys and values [B, T, K, H] of one layer in the slots of their positions [B, T], in place.

    The token at position p goes to slot p mod S; tokens at negative positions (padding) are not stored.
    """
    stacks = stacked(kv)
    call = jax.ffi.ffi_call(
        "phi3_cache_write",
        [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in stacks],
        input_output_aliases={i: i for i in range(len(stacks))},
        vmap_method="sequential",
    )
    new = (k.astype(jnp.float32), v.astype(jnp.float32))
    k, v, k_scale, v_scale = call(*stacks, *new, positions, index(kv.layer))
    if kv.k_scale is None:
        return KeysValues(k, v, layer=kv.layer)
    return KeysValues(k, v, k_scale, v_scale, kv.layer)


def reserve(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array whose memory is left as it came; for caches, of which the kernels read no slot without a token."""
    library()  # raises Unavailable
    return _reserve(shape, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reserve(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.ffi.ffi_call("phi3_reserve", jax.ShapeDtypeStruct(shape, dtype))()


def stacked(kv: KeysValues) -> list[jax.Array]:
    """Keys, values and their scales as stacks over layers; missing scales become empty arrays."""
    scales = [jnp.zeros(0, jnp.float32) if each is None else each for each in (kv.k_scale, kv.v_scale)]
    leaves = [kv.k, kv.v, *scales]
    return [leaf[None] for leaf in leaves] if kv.layer is None else leaves


def segments(visible: Visibility) -> list[jax.Array]:
    """The segments of queries and keys; missing ones become empty arrays."""
    return [jnp.zeros(0, jnp.int32) if each is None else each for each in (visible.q_segments, visible.k_segments)]


def index(layer: jax.Array | None) -> jax.Array:
    """The layer of a stack, int32; 0 where there is none."""
    return jnp.int32(0) if layer is None else layer.astype(jnp.int32)

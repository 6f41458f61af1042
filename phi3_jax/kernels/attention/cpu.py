"""The CPU kernels: keys and values are read once, block by block, and scores of a whole prompt are never held.

Axis letters: L layer, B batch, T new token, S slot, K key-value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.attention.arguments import Context, Keys
from phi3_jax.kernels.native.build import library

CACHE_DTYPES = ("float32", "bfloat16", "int8")


def attention(q: jax.Array, keys: Keys, context: Context) -> jax.Array:
    """See `kernels.attention`."""
    if (reason := why_not_dtype(keys.k.dtype)) is not None:
        raise ValueError(reason)
    library()  # raises where there is none
    call = jax.ffi.ffi_call("phi3_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential")
    out = call(
        q.astype(jnp.float32),
        *_stacked(keys),
        context.q_positions,
        context.k_positions,
        *_segments(context),
        _index(keys.layer),
        window=np.int64(context.window or 0),
    )
    return out.astype(q.dtype)


def why_not_dtype(dtype: jax.typing.DTypeLike) -> str | None:
    """Why the kernels cannot read keys and values of this dtype; None if they can."""
    known = jnp.dtype(dtype) in CACHE_DTYPES
    return None if known else f"the CPU kernels read keys of {CACHE_DTYPES}, not {jnp.dtype(dtype)}"


def write(keys: Keys, positions: jax.Array, k: jax.Array, v: jax.Array) -> Keys:
    """Stores new keys and values [B, T, K, H] of one layer in the slots of their positions [B, T], in place.

    The token at position p goes to slot p mod S, and one at a negative position nowhere.
    """
    stacked = _stacked(keys)
    call = jax.ffi.ffi_call(
        "phi3_cache_write",
        [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in stacked],
        input_output_aliases={i: i for i in range(len(stacked))},
        vmap_method="sequential",
    )
    new = (k.astype(jnp.float32), v.astype(jnp.float32))
    k, v, k_scale, v_scale = call(*stacked, *new, positions, _index(keys.layer))
    if keys.k_scale is None:
        return Keys(k, v, layer=keys.layer)
    return Keys(k, v, k_scale, v_scale, keys.layer)


def _stacked(keys: Keys) -> list[jax.Array]:
    """Keys, values and their scales as stacks over layers; scales that there are not become empty arrays."""
    scales = [jnp.zeros(0, jnp.float32) if each is None else each for each in (keys.k_scale, keys.v_scale)]
    leaves = [keys.k, keys.v, *scales]
    return [leaf[None] for leaf in leaves] if keys.layer is None else leaves


def _segments(context: Context) -> list[jax.Array]:
    return [jnp.zeros(0, jnp.int32) if each is None else each for each in (context.q_segments, context.k_segments)]


def _index(layer: jax.Array | None) -> jax.Array:
    return jnp.int32(0) if layer is None else layer.astype(jnp.int32)

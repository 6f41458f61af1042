"""The reference: scores of every query and key, masked, then a softmax.

Axis letters: B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from phi3_jax.kernels.attention.arguments import Context, Keys
from phi3_jax.kernels.attention.masks import attention_mask


def attention(q: jax.Array, keys: Keys, context: Context) -> tuple[jax.Array, jax.Array]:
    """See `kernels.attention`; returns the probabilities [B, N, T, S] in q's dtype, too."""
    k, v = (each[..., : q.shape[-1]].astype(q.dtype) for each in _floats(keys))
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    c = context
    mask = attention_mask(c.q_positions, c.k_positions, c.window, c.q_segments, c.k_segments)
    q = q.reshape(B, T, K, N // K, H)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, precision=exact, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", probs, v, precision=exact)
    return out.reshape(B, T, N, H), probs.reshape(B, N, T, S)


def _floats(keys: Keys) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, each [B, K, S, H], as floats."""
    if keys.layer is not None:
        keys = jax.tree.map(lambda leaf: leaf[keys.layer], Keys(keys.k, keys.v, keys.k_scale, keys.v_scale))
    if keys.k_scale is None or keys.v_scale is None:
        return keys.k, keys.v
    return keys.k * keys.k_scale[..., None], keys.v * keys.v_scale[..., None]

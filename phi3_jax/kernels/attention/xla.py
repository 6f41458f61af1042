"""The reference: scores of every query and key, masked, then a softmax.

Axis letters: B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility


def attention(
    q: jax.Array, kv: KeysValues, visible: Visibility, at: Callable[[str, jax.Array], jax.Array] | None = None
) -> jax.Array:
    """See `kernels.attention`.

    Args:
      at: is called with "attn.scores" and "attn.pattern", and these, float32 [B, N, T, S]: the scores before and the
        weights after the softmax; it returns what is used in their place. Scores of hidden keys are about -3e38, also
        of those that it returns, and lower than any other: where it returns -inf for all keys that a query sees, these
        have the same weight.
    """
    k, v = (each[..., : q.shape[-1]].astype(q.dtype) for each in _floats(kv))
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    mask = visible.mask()
    q = q.reshape(B, T, K, N // K, H)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, precision=exact, preferred_element_type=jnp.float32) * H**-0.5
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores, lowest)
    if at is not None:
        scores = at("attn.scores", scores.reshape(B, N, T, S)).reshape(scores.shape)
        scores = jnp.where(mask[:, None, None], jnp.maximum(scores, lowest / 2), lowest)
        # Slots that hold nothing may be memory as it came, and 0 * NaN is NaN.
        v = jnp.where((visible.k_positions >= 0)[:, None, :, None], v, 0)
    probs = jax.nn.softmax(scores, axis=-1)
    if at is not None:
        probs = at("attn.pattern", probs.reshape(B, N, T, S)).reshape(probs.shape)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", probs.astype(q.dtype), v, precision=exact)
    return out.reshape(B, T, N, H)


def _floats(kv: KeysValues) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, each [B, K, S, H], as floats."""
    if kv.layer is not None:
        kv = jax.tree.map(lambda leaf: leaf[kv.layer], KeysValues(kv.k, kv.v, kv.k_scale, kv.v_scale))
    if kv.k_scale is None or kv.v_scale is None:
        return kv.k, kv.v
    return kv.k * kv.k_scale[..., None], kv.v * kv.v_scale[..., None]

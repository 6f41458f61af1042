"""Attention without a cache, which keeps no probabilities for the backward pass.

As in FlashAttention (arXiv:2205.14135) the backward pass recomputes them, from the scores' maximum and the sum of
exponentials; but here all scores of a layer are in memory at once. In products that sum over queries, the small factor
comes first, because XLA's CPU backend transposes the first factor in memory.

Axis letters: B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

KEPT = "attention"  # the name by which a rematerialisation policy can keep what the backward pass needs
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def attention(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """See `kernels.attention`; the keys are those of one layer, as floats of the queries' dtype."""
    (B, T, N, H), K = q.shape, kv.k.shape[1]
    mask = visible.mask()
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    out = _attend(grouped, kv.k, kv.v, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H], mask bool [B, T, S] -> [B, K, G, T, H]."""
    return _forward(q, k, v, mask)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = _scores(q, k, mask)
    top = scores.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    out = _einsum("BKGTS,BKSH->BKGTH", exponentials.astype(q.dtype), v, preferred_element_type=jnp.float32)
    kept = checkpoint_name(((out / total).astype(q.dtype), top, total), KEPT)
    return kept[0], (q, k, v, mask, *kept)


def _backward(kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask, out, top, total = kept
    probs = jnp.exp(_scores(q, k, mask) - top) / total
    d_v = _einsum("BKGTH,BKGTS->BKHS", d_out, probs.astype(q.dtype)).swapaxes(2, 3)
    d_probs = _einsum("BKGTH,BKSH->BKGTS", d_out, v, preferred_element_type=jnp.float32)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    # A query that sees no key has probabilities, too, but its scores are constants without a gradient.
    d_scores = jnp.where(mask[:, None, None], probs * (d_probs - mean) * q.shape[-1] ** -0.5, 0).astype(q.dtype)
    d_q = _einsum("BKGTS,BKSH->BKGTH", d_scores, k)
    d_k = _einsum("BKGTH,BKGTS->BKHS", q, d_scores).swapaxes(2, 3)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, S]."""
    scores = _einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)

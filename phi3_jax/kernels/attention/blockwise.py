"""Attention in plain JAX over blocks of queries and keys: no array of T x S scores, in either direction.

The softmax is computed as the blocks go by, from each query's highest score and sum of exponentials so far, and the
backward pass computes the scores again from their logarithm (FlashAttention, arXiv:2205.14135). Where all scores are
few there is one block. In products that sum over queries the small factor comes first, because XLA's CPU backend
transposes the first factor in memory.

Axis letters: L layer, B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from phi3_jax.kernels.attention import xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.masks import attention_mask

KEPT = "attention"  # the name by which a rematerialisation policy can keep what the backward pass needs
SCORES = 2**23  # as many at a time: 32 MiB in float32
_SIDES = (128, 1024)  # of a block that is not the only one
_T = 3  # the axis of queries in [B, K, G, T, H], and of keys in [B, K, H, S]
_S = 2
_LOWEST = float(jnp.finfo(jnp.float32).min)
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_einsum32 = functools.partial(_einsum, preferred_element_type=jnp.float32)

Softmax = tuple[jax.Array, jax.Array, jax.Array]  # sums of exponentials times values, highest scores, their sums


def is_large(q: jax.Array, slots: int) -> bool:
    """Whether the scores of queries [B, T, N, H] with so many keys take more than one block."""
    return math.prod(q.shape[:3]) * slots > SCORES


def attention(q: jax.Array, kv: KeysValues, visible: Visibility, scores: int = SCORES) -> jax.Array:
    """See `kernels.attention`; the keys are those of one layer, in the queries' dtype. A query without keys gives 0.

    `scores` is how many are in memory at a time, about.
    """
    out = _attend(scores, _grouped(q, kv), kv.k, kv.v, visible)
    return _ungrouped(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores: int, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H] -> [B, K, G, T, H]."""
    return _forward(scores, q, k, v, visible)[0]


def _forward(
    scores: int, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility
) -> tuple[jax.Array, tuple[Any, ...]]:
    rows, columns = _blocks(q, k, scores)

    def step(softmax: Softmax, i: Any, j: Any) -> Softmax:
        mask = _mask(visible, rows, columns, i, j)
        products = _einsum32("BKGTH,BKSH->BKGTS", rows.take(q, i, _T), columns.take(k, j, _S))
        sums, top, total = (rows.take(each, i, _T) for each in softmax)
        own = _fold((sums, top, total), _scores(products, q, mask), columns.take(v, j, _S), mask)
        sums, top, total = (rows.put(whole, each, i, _T) for whole, each in zip(softmax, own, strict=True))
        return sums, top, total

    sums, top, total = _over_pairs(rows, columns, visible, step, _empty(q))
    out = _divided(sums, total).astype(q.dtype)
    # A query that sees nothing has probabilities of 0: exp(... - infinity).
    logarithm = jnp.where(total > 0, top + jnp.log(total), jnp.inf)
    out, logarithm = checkpoint_name((out, logarithm), KEPT)
    return out, (q, k, v, visible, out, logarithm)


def _backward(scores: int, kept: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, visible, out, logarithm = kept
    rows, columns = _blocks(q, k, scores)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def step(gradients: tuple[jax.Array, ...], i: Any, j: Any) -> tuple[jax.Array, ...]:
        d_q, d_k, d_v = gradients  # those of keys and values are [B, K, H, S]
        own_q, own_d_out, own_mean, own_logarithm = (rows.take(x, i, _T) for x in (q, d_out, mean, logarithm))
        own_k, own_v = columns.take(k, j, _S), columns.take(v, j, _S)
        products = _einsum32("BKGTH,BKSH->BKGTS", own_q, own_k)
        own_scores = _scores(products, q, _mask(visible, rows, columns, i, j))
        probs = jnp.exp(own_scores - own_logarithm[..., None])
        d_probs = _einsum32("BKGTH,BKSH->BKGTS", own_d_out, own_v)
        d_scores = (probs * (d_probs - own_mean[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        return (
            rows.add(d_q, _einsum("BKGTS,BKSH->BKGTH", d_scores, own_k), i, _T),
            columns.add(d_k, _einsum("BKGTH,BKGTS->BKHS", own_q, d_scores), j, _T),
            columns.add(d_v, _einsum("BKGTH,BKGTS->BKHS", own_d_out, probs.astype(q.dtype)), j, _T),
        )

    zeros = tuple(jnp.zeros(each.shape, jnp.float32) for each in (q, k.swapaxes(2, 3), v.swapaxes(2, 3)))
    d_q, d_k, d_v = _over_pairs(rows, columns, visible, step, zeros)
    d_k, d_v = d_k.swapaxes(2, 3), d_v.swapaxes(2, 3)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


@jax.custom_jvp
def cached(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """See `kernels.attention`. Keys are read block by block, and only those that some query may see.

    Derivatives are those of xla.py, with all scores.
    """
    return cached_in_blocks(q, kv, visible, SCORES)


@cached.defjvp
def _cached_derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    return jax.jvp(xla.attention, primals, tangents)


def cached_in_blocks(q: jax.Array, kv: KeysValues, visible: Visibility, scores: int) -> jax.Array:
    """`cached` with about so many scores at a time."""
    (B, T, N, _), S = q.shape, kv.k.shape[-2]
    # All queries are one block, if that leaves room for keys: each block of queries reads all keys.
    rows = _Axis(T, min(T, max(_SIDES[0], scores // (B * N * min(S, _SIDES[0])))))
    columns = _Axis(S, min(S, max(_SIDES[0], scores // (B * N * rows.size))))
    grouped = _grouped(q, kv)

    def of_queries(i: Any, out: jax.Array) -> jax.Array:
        own = rows.take(grouped, i, _T)
        seen = dataclasses.replace(
            visible,
            q_positions=rows.take(visible.q_positions, i, 1),
            q_segments=None if visible.q_segments is None else rows.take(visible.q_segments, i, 1),
        )

        def step(j: Any, softmax: Softmax) -> Softmax:
            k, v = _slots(kv, columns, j, own)
            # Queries that two blocks have are computed twice; keys may count only once.
            mask = _mask(seen, _Axis(rows.size, rows.size), columns, 0, j)
            # With the queries first, XLA for GPUs would lay out the whole cache anew before the loop.
            products = jnp.moveaxis(_einsum32("BKSH,BKGTH->BKSGT", k, own), _S, -1)
            return _fold(softmax, _scores(products, own, mask), v, mask)

        first, last = _seen_slots(seen)
        sums, _, total = jax.lax.fori_loop(first // columns.size, -(-last // columns.size), step, _empty(own))
        return rows.put(out, _divided(sums, total).astype(q.dtype), i, _T)

    zeros = jnp.zeros_like(grouped)
    out = of_queries(0, zeros) if rows.count == 1 else jax.lax.fori_loop(0, rows.count, of_queries, zeros)
    return _ungrouped(out)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis in blocks of one size, of which the last begins early enough to be whole."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def start(self, number: Any) -> Any:
        return jnp.minimum(number * self.size, self.length - self.size)

    def take(self, x: jax.Array, number: Any, axis: int) -> jax.Array:
        if self.count == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start(number), self.size, axis)

    def put(self, x: jax.Array, new: jax.Array, number: Any, axis: int) -> jax.Array:
        if self.count == 1:
            return new
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.start(number), axis)

    def add(self, x: jax.Array, new: jax.Array, number: Any, axis: int) -> jax.Array:
        return self.put(x, self.take(x, number, axis) + new, number, axis)

    def is_new(self, number: Any) -> jax.Array:
        """bool [size]: what no earlier block has."""
        return self.start(number) + jnp.arange(self.size) >= number * self.size


def _blocks(q: jax.Array, k: jax.Array, scores: int) -> tuple[_Axis, _Axis]:
    """Of queries [B, K, G, T, H], and of their keys [B, K, S, H]."""
    heads, T, S = math.prod(q.shape[:_T]), q.shape[_T], k.shape[_S]
    if heads * T * S <= scores:
        return _Axis(T, T), _Axis(S, S)
    side = 2 ** int(math.log2(math.isqrt(scores // heads) or 1))
    side = min(max(side, _SIDES[0]), _SIDES[1])
    return _Axis(T, min(T, side)), _Axis(S, min(S, side))


def _over_pairs(
    rows: _Axis, columns: _Axis, visible: Visibility, step: Callable[[Any, Any, Any], Any], carry: Any
) -> Any:
    """step(carry, i, j) -> carry, for each block i of queries and j of keys that may see one another."""
    pairs = [(i, j) for i in range(rows.count) for j in range(columns.count) if _may_see(rows, columns, visible, i, j)]
    if len(pairs) == 1:
        return step(carry, 0, 0)
    i, j = np.asarray(pairs, np.int32).T
    return jax.lax.scan(lambda carry, pair: (step(carry, *pair), None), carry, (i, j))[0]


def _may_see(rows: _Axis, columns: _Axis, visible: Visibility, i: int, j: int) -> bool:
    """Whether a query of a block may see a key of another, as far as is known before positions are."""
    if not visible.in_order:
        return True
    last_query = min((i + 1) * rows.size, rows.length) - 1
    last_key = min((j + 1) * columns.size, columns.length) - 1
    is_past = visible.window is not None and last_key <= i * rows.size - visible.window
    return j * columns.size <= last_query and not is_past


def _mask(visible: Visibility, rows: _Axis, columns: _Axis, i: Any, j: Any) -> jax.Array:
    """bool [B, rows.size, columns.size]; False for what earlier blocks have."""
    q_segments, k_segments = visible.q_segments, visible.k_segments
    if q_segments is not None and k_segments is not None:
        q_segments, k_segments = rows.take(q_segments, i, 1), columns.take(k_segments, j, 1)
    q_positions, k_positions = rows.take(visible.q_positions, i, 1), columns.take(visible.k_positions, j, 1)
    mask = attention_mask(q_positions, k_positions, visible.window, q_segments, k_segments)
    if rows.length % rows.size:
        mask &= rows.is_new(i)[:, None]
    if columns.length % columns.size:
        mask &= columns.is_new(j)
    return mask


def _scores(products: jax.Array, q: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, S], from the products of queries and keys."""
    return jnp.where(mask[:, None, None], products * q.shape[-1] ** -0.5, _LOWEST)


def _empty(q: jax.Array) -> Softmax:
    """Of queries [B, K, G, T, H] that have seen nothing yet."""
    one = jnp.zeros(q.shape[:-1], jnp.float32)
    return jnp.zeros(q.shape, jnp.float32), one + _LOWEST, one


def _fold(softmax: Softmax, scores: jax.Array, v: jax.Array, mask: jax.Array) -> Softmax:
    """The softmax with one more block of keys."""
    sums, top, total = softmax
    higher = jnp.maximum(top, scores.max(axis=-1))
    # Before its first key a query's highest score is _LOWEST, and so are the scores of keys that it does not see.
    exponentials = jnp.where(mask[:, None, None], jnp.exp(scores - higher[..., None]), 0)
    old = jnp.exp(top - higher)
    new = _einsum32("BKGTS,BKSH->BKGTH", exponentials.astype(v.dtype), v)
    return sums * old[..., None] + new, higher, total * old + exponentials.sum(axis=-1)


def _divided(sums: jax.Array, total: jax.Array) -> jax.Array:
    return sums / jnp.where(total > 0, total, 1)[..., None]


def _slots(kv: KeysValues, columns: _Axis, j: Any, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A block of one layer's keys and values, each [B, K, s, H] as floats; nothing else of the cache is read."""

    def block(leaf: jax.Array) -> jax.Array:
        if kv.layer is None:
            return columns.take(leaf, j, _S)
        begin = (kv.layer, 0, 0, columns.start(j), 0)[: leaf.ndim]
        size = (1, *leaf.shape[1:3], columns.size, *leaf.shape[4:])
        return jax.lax.dynamic_slice(leaf, [jnp.int32(each) for each in begin], size)[0]

    k, v = block(kv.k), block(kv.v)
    if kv.k_scale is not None and kv.v_scale is not None:
        k, v = k * block(kv.k_scale)[..., None], v * block(kv.v_scale)[..., None]
    return k[..., : q.shape[-1]].astype(q.dtype), v[..., : q.shape[-1]].astype(q.dtype)


def _seen_slots(visible: Visibility) -> tuple[jax.Array, jax.Array]:
    """int32 (first, last + 1): no query of any row sees a slot outside; (0, 0) if none sees any."""
    q, k = visible.q_positions, visible.k_positions
    seen = (k >= 0) & (k <= q.max(axis=-1, keepdims=True))
    if visible.window is not None:
        lowest = jnp.where(q >= 0, q, jnp.iinfo(jnp.int32).max).min(axis=-1, keepdims=True)
        seen &= k > lowest - visible.window
    seen = seen.any(axis=0)
    first, after = jnp.argmax(seen), seen.size - jnp.argmax(seen[::-1])
    return jnp.where(seen.any(), first, 0).astype(jnp.int32), jnp.where(seen.any(), after, 0).astype(jnp.int32)


def _grouped(q: jax.Array, kv: KeysValues) -> jax.Array:
    (B, T, N, H), K = q.shape, kv.k.shape[-3]
    return q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _ungrouped(out: jax.Array) -> jax.Array:
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)

"""The TPU kernel: it reads the slots that are seen, once, and never stores the scores of a whole prompt.

Queries are cut into blocks of rows, slots into blocks too. A list says which pairs of blocks have anything to do, and
the grid walks that list: slots that are empty, in the future of all queries of a block or behind their windows are not
fetched, in a ring as in a full cache, and cost no turn of the grid. The softmax is online, in float32.

Axis letters: L layer, B batch, T query, S slot, N query heads, K key-value heads, G = N/K, H head dim; I and J count
blocks of queries and of slots.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

_LANES = 128
_FEW_ROWS = 1024  # rows of all heads together, up to which a turn of the grid computes all heads
_ROWS = 512  # of one head, where there are more
_SLOTS = 1024  # of a block where a turn computes one head
_KEY_BYTES = 2**20  # of a block where a turn computes all: below, turns cost more than what they read
_HIDDEN = -1e30  # the score of a key that is not seen; finite, so that a row that sees none gets no NaN


class _Blocks(NamedTuple):
    """How many key-value heads, queries and slots a turn of the grid takes."""

    heads: int
    queries: int
    slots: int


class _Arrays(NamedTuple):
    """What the kernel reads: arrays, or blocks of them.

    Attributes:
      q: [B * I, K, rows, H], where a row is a query and a head of the group.
      q_positions, q_segments: int32 [B * I, rows, 1].
      k_positions, k_segments: int32 [B, 1, S rounded up to whole blocks].
      k, v: [L, B, K, S, H].
      k_scale, v_scale: float32 [L, B, K, S].
    """

    q: Any
    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


def attention(q: jax.Array, kv: KeysValues, visible: Visibility, interpret: Any = False) -> jax.Array:
    """See `kernels.attention`; `interpret` is pallas_call's, for tests on other platforms."""
    (B, T, N, H), (K, _, width) = q.shape, kv.k.shape[-3:]
    G, blocks = N // K, _block_sizes(q, kv.k)
    I = -(-T // blocks.queries)  # noqa: E741

    def by_block(x: jax.Array, fill: int = 0) -> jax.Array:
        """[B, T, ...] -> [B * I, queries of a block, ...]."""
        padding = [(0, 0), (0, I * blocks.queries - T)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding, constant_values=fill).reshape(B * I, blocks.queries, *x.shape[2:])

    def by_row(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.repeat(by_block(x, -1), G, axis=1)[..., None]

    def by_slot(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        # Past the end of an array a block holds anything, a position that is seen, for instance.
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % blocks.slots)], constant_values=-1)[:, None]

    def stacked(x: jax.Array | None) -> jax.Array | None:
        return x[None] if x is not None and kv.layer is None else x

    rows = by_block(jnp.pad(q, [(0, 0), (0, 0), (0, 0), (0, width - H)]))
    rows = rows.reshape(B * I, blocks.queries, K, G, width).swapaxes(1, 2).reshape(B * I, K, -1, width)
    positions = by_row(visible.q_positions), by_slot(visible.k_positions)
    segments: tuple[jax.Array | None, jax.Array | None] = (None, None)
    if visible.q_segments is not None and visible.k_segments is not None:
        segments = by_row(visible.q_segments), by_slot(visible.k_segments)
    stacks = [stacked(x) for x in (kv.k, kv.v, kv.k_scale, kv.v_scale)]
    arrays = _Arrays(rows, *positions, *segments, *stacks)
    work, turns = _work(by_block(visible.q_positions, -1).reshape(B, I, -1), visible, blocks)
    layer = jnp.zeros(1, jnp.int32) if kv.layer is None else kv.layer.astype(jnp.int32).reshape(1)
    out = _call(arrays, (layer, *work), turns, blocks, H**-0.5, visible.window, interpret)
    out = out[..., :H].reshape(B, I, K, blocks.queries, G, H).swapaxes(2, 3)
    return out.reshape(B, I * blocks.queries, N, H)[:, :T]


def _block_sizes(q: Any, k: Any) -> _Blocks:
    """Few rows, as in decoding: all heads at a time, so that a turn reads enough; else one head and many rows."""
    (T, N), (K, S, width) = q.shape[1:3], k.shape[-3:]
    if N * T <= _FEW_ROWS:
        heads, queries = K, T
        most = min(max(_KEY_BYTES // (K * width * k.dtype.itemsize), _LANES), 4 * _LANES)
    else:
        heads, queries = 1, min(T, max(_ROWS * K // N // 16 * 16, 16))
        most = _SLOTS
    if most >= S:
        return _Blocks(heads, queries, S)
    slots = -(-S // -(-S // most))  # blocks of one size, as nearly as multiples of 128 allow
    return _Blocks(heads, queries, -(-slots // _LANES) * _LANES)


def _work(q: jax.Array, visible: Visibility, blocks: _Blocks) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The turns of the grid: ((blocks of queries, their rows of the cache, blocks of slots), how many turns).

    The three are int32 [B * I * J (+ 1)], sorted by block of queries, each of which has one turn at least because its
    output must be written. The first has -1 after its end. q is int32 [B, I, queries of a block].
    """
    (B, I), S = q.shape[:2], visible.k_positions.shape[1]  # noqa: E741
    J = -(-S // blocks.slots)
    k = jnp.pad(visible.k_positions, [(0, 0), (0, J * blocks.slots - S)], constant_values=-1)
    k = k.reshape(B, 1, J, blocks.slots)
    seen = (k >= 0) & (k <= q.max(axis=-1)[..., None, None])
    if visible.window is not None:
        first = jnp.where(q >= 0, q, jnp.iinfo(jnp.int32).max).min(axis=-1)
        seen &= k > first[..., None, None] - visible.window
    needed = seen.any(axis=-1)
    needed = needed.at[..., 0].set(needed[..., 0] | ~needed.any(axis=-1)).reshape(-1)
    turns = needed.sum(dtype=jnp.int32)
    places = jnp.nonzero(needed, size=needed.size, fill_value=0)[0].astype(jnp.int32)
    block = jnp.where(jnp.arange(needed.size) < turns, places // J, -1)
    return (jnp.pad(block, (0, 1), constant_values=-1), places // (I * J), places % J), turns


def _call(
    arrays: _Arrays,
    scalars: tuple[jax.Array, ...],
    turns: jax.Array,
    blocks: _Blocks,
    factor: float,
    window: int | None,
    interpret: Any,
) -> jax.Array:
    (_, K, M, width), S = arrays.q.shape, arrays.k.shape[-2]
    # The prefetched scalars are, in this order: layer, block of queries, row of the cache, block of slots.
    of_block = pl.BlockSpec((1, M, 1), lambda head, turn, layer, block, row, slot: (block[turn], 0, 0))
    of_slot = pl.BlockSpec((1, 1, blocks.slots), lambda head, turn, layer, block, row, slot: (row[turn], 0, slot[turn]))
    of_query = pl.BlockSpec(
        (1, blocks.heads, M, width), lambda head, turn, layer, block, row, slot: (block[turn], head, 0, 0)
    )
    of_key = pl.BlockSpec(
        (1, 1, blocks.heads, blocks.slots, width),
        lambda head, turn, layer, block, row, slot: (layer[0], row[turn], head, slot[turn], 0),
    )
    # All heads': a block of fewer than 8 rows would not be allowed.
    of_scale = pl.BlockSpec(
        (1, 1, K, blocks.slots), lambda head, turn, layer, block, row, slot: (layer[0], row[turn], 0, slot[turn])
    )
    specs = _Arrays(of_query, of_block, of_slot, of_block, of_slot, of_key, of_key, of_scale, of_scale)
    present = _Arrays(*(None if x is None else spec for x, spec in zip(arrays, specs, strict=True)))
    state = [pltpu.VMEM((blocks.heads, M, size), jnp.float32) for size in (1, 1, width)]
    call = pl.pallas_call(
        functools.partial(_kernel, slots=S, factor=factor, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // blocks.heads, turns),
            in_specs=[present],
            out_specs=of_query,
            scratch_shapes=state,
        ),
        out_shape=jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="attention",
    )
    out: jax.Array = call(*scalars, arrays)
    return out


def _kernel(
    _layer: Any,
    block: Any,
    _row: Any,
    slot: Any,
    x: _Arrays,
    out: Any,
    top: Any,
    total: Any,
    acc: Any,
    *,
    slots: int,
    factor: float,
    window: int | None,
) -> None:
    """One turn: a block of queries meets a block of slots.

    `top`, `total` [heads, rows, 1] and `acc` [heads, rows, H] are the greatest score so far, and the sums of
    exponentials and of values, relative to it.
    """
    head, turn = pl.program_id(0), pl.program_id(1)

    @pl.when((turn == 0) | (block[turn] != block[jnp.maximum(turn - 1, 0)]))
    def _() -> None:
        top[...] = jnp.full_like(top, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    q, k, v = x.q[0], x.k[0, 0], x.v[0, 0]
    heads, size = k.shape[:2]
    if slots % size:  # The last block goes past the end: what is read there may be NaN, and 0 * NaN is not 0.
        left = slots - slot[turn] * size
        v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < left, v, jnp.zeros_like(v))
    scores = _products(q, k, 2) * factor
    if x.k_scale is not None:
        scores = scores * _scale(x.k_scale, head, heads)
    scores = jnp.where(_mask(x, window)[None], scores, _HIDDEN)
    before, highest = top[...], scores.max(axis=-1, keepdims=True)
    after = jnp.maximum(before, highest)
    kept, weights = jnp.exp(before - after), jnp.exp(scores - after)
    top[...] = after
    total[...] = kept * total[...] + weights.sum(axis=-1, keepdims=True)
    if x.v_scale is not None:
        scale = _scale(x.v_scale, head, heads)
        if slots % size:
            scale = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scale.shape, 2) < left, scale, 0.0)
        weights = weights * scale
    acc[...] = kept * acc[...] + _products(weights.astype(q.dtype), v, 1)

    @pl.when(block[turn] != block[turn + 1])
    def _() -> None:
        out[0] = (acc[...] / total[...]).astype(out.dtype)


def _scale(block: Any, head: Any, heads: int) -> jax.Array:
    """The scales of a turn's heads, float32 [heads, 1, slots of the block], of a block with those of all heads."""
    mine = block[0, 0] if heads == block.shape[2] else block[0, 0, pl.ds(head, 1)]
    return mine[:, None]


def _mask(x: _Arrays, window: int | None) -> jax.Array:
    """bool [rows, slots of the block]: the rule of masks.py."""
    q, k = x.q_positions[0], x.k_positions[0]
    visible = (k >= 0) & (k <= q)
    if window is not None:
        visible &= k > q - window
    if x.q_segments is not None:
        visible &= x.q_segments[0] == x.k_segments[0]
    return visible


def _products(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """For each head, a [heads, rows, X] times b summed over b's `axis` -> float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b.astype(a.dtype), (((2,), (axis,)), ((0,), (0,))), precision=exact, preferred_element_type=jnp.float32
    )

"""Keys and values of a chunk of tokens, copied out of a row of a cache, and into one.

Each is one compiled program, whatever the row and the place. A row's slots are a multiple of a chunk's tokens, so that
a ring holds each chunk in one part. Chunks stay on the device: they come from there and go back
there, and on the CPU the host's memory is the device's.

Axis letters: L layer, B batch, K key-value heads, S cache slot, C token of a chunk, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.model import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a cache holds of C tokens that follow one another, in their order.

    Attributes:
      k, v: [L, K, C, H], as the cache has them: rounded, and on a TPU with zeros behind each head.
      k_scale, v_scale: float32 [L, K, C] where k and v are int8; else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def chunk_bytes(cache: KVCache, length: int) -> int:
    """Bytes of a chunk of `length` tokens of this cache."""
    rows, slots = cache.positions.shape
    return sum(array.nbytes for array in jax.tree.leaves(_arrays(cache))) // (rows * slots) * length


def first_needed(length: int, end: int, sliding_window: int | None) -> int:
    """The number of the first chunk of which the token at position `end`, or one after it, sees something.

    Args:
      length: C.
      end: the chunks are those of the tokens before it.
    """
    return 0 if sliding_window is None else max(0, end - sliding_window + 1) // length


def take(cache: KVCache, row: int, begin: int, length: int) -> Chunk:
    """Copies what a row holds of the `length` tokens from position `begin` on, a multiple of `length`.

    All of them must be there still: a ring overwrites its oldest tokens.

    Raises:
      ValueError: the row's slots are no multiple of `length`, so that a ring would hold some chunks in two parts.
    """
    _check(cache, length)
    return _take(cache, np.int32(row), np.int32(begin), length)


def place(cache: KVCache, row: int, chunks: Sequence[Chunk], end: int) -> KVCache:
    """Copies chunks into a row, the last of which ends before position `end`. Afterwards it holds nothing else.

    Args:
      cache: its memory is donated to the result.
      chunks: neighbours, oldest first; at least one, and not more than a row has room for.

    Raises:
      ValueError: there are none, or too many; the row's slots are no multiple of a chunk's tokens.
    """
    length = chunks[0].k.shape[2] if chunks else 1
    _check(cache, length)
    if not 1 <= len(chunks) * length <= cache.capacity:
        raise ValueError(f"{len(chunks)} chunks of {length} tokens for a row of {cache.capacity} slots")
    for number, chunk in enumerate(chunks):
        begin = end - (len(chunks) - number) * length
        cache = _place(cache, chunk, np.int32(row), np.int32(begin), np.bool_(number == 0))
    return cache


def move(target: KVCache, place: int, source: KVCache, row: int, begin: int, length: int) -> KVCache:
    """Copies `length` slots of a row of the source, from `begin` on, and the row's positions, to row `place`.

    Args:
      target: its memory is donated to the result.
      begin: a multiple of `length`, of which the row's slots are one, too.
    """
    # Two programs: of one XLA makes a loop over all slots of the row. And one that looped would copy the whole cache.
    chunk = take(source, row, begin, length)
    return _put_row(target, chunk, source.positions, *map(np.int32, (place, row, begin)))


def _arrays(cache: KVCache | Chunk) -> Chunk:
    """k, v and their scales; [L, B, K, S, H] and [L, B, K, S] of a cache."""
    return Chunk(cache.k, cache.v, cache.k_scale, cache.v_scale)


def _check(cache: KVCache, length: int) -> None:
    if length < 1 or cache.capacity % length:
        raise ValueError(
            f"a chunk of {length} tokens would be cut in two by the end of a row of {cache.capacity} slots: make a "
            "cache whose slots are a multiple of the chunk"
        )


def pick(array: jax.Array, row: jax.Array, slot: jax.Array, length: int) -> jax.Array:
    """`length` slots of a row: [L, B, K, S, ...] -> [L, K, length, ...]."""
    sizes = (len(array), 1, array.shape[2], length, *array.shape[4:])
    return jax.lax.dynamic_slice(array, _where(array, row, slot), sizes)[:, 0]


def put(array: jax.Array, part: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
    """Replaces slots of a row of [L, B, K, S, ...], from `slot` on, by `part` [L, K, length, ...].

    Where the array is donated to a program that does this and no more, it is done in place; two such writes, or one in
    a loop, would copy it.
    """
    # As integers: XLA for the CPU takes 12 times as long for bfloat16, and changes the bits of NaN.
    kind = f"uint{8 * array.dtype.itemsize}"
    bits, new = (jax.lax.bitcast_convert_type(each, kind) for each in (array, part))
    bits = jax.lax.dynamic_update_slice(bits, new[:, None], _where(array, row, slot))
    return jax.lax.bitcast_convert_type(bits, array.dtype)


@functools.partial(jax.jit, static_argnames="length")
def _take(cache: KVCache, row: jax.Array, begin: jax.Array, length: int) -> Chunk:
    return jax.tree.map(lambda array: pick(array, row, begin % cache.capacity, length), _arrays(cache))


@functools.partial(jax.jit, donate_argnames="cache")
def _place(cache: KVCache, chunk: Chunk, row: jax.Array, begin: jax.Array, is_first: jax.Array) -> KVCache:
    slot = begin % cache.capacity
    arrays = jax.tree.map(lambda old, new: put(old, new, row, slot), _arrays(cache), chunk)
    positions = begin + jnp.arange(chunk.k.shape[2], dtype=jnp.int32)
    held = jnp.where(is_first, -1, cache.positions[row]).at[positions % cache.capacity].set(positions)
    return KVCache(arrays.k, arrays.v, cache.positions.at[row].set(held), arrays.k_scale, arrays.v_scale)


@functools.partial(jax.jit, donate_argnames="target")
def _put_row(
    target: KVCache, chunk: Chunk, positions: jax.Array, place: jax.Array, row: jax.Array, begin: jax.Array
) -> KVCache:
    arrays = jax.tree.map(lambda old, new: put(old, new, place, begin), _arrays(target), chunk)
    return KVCache(arrays.k, arrays.v, target.positions.at[place].set(positions[row]), arrays.k_scale, arrays.v_scale)


def _where(array: jax.Array, row: jax.Array, slot: jax.Array) -> tuple[jax.Array, ...]:
    zero = jnp.int32(0)
    return (zero, row, zero, slot, *[zero] * (array.ndim - 4))

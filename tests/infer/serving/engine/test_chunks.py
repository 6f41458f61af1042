"""Chunks copied out of caches and into them, bit for bit, beside NumPy's copies of one token after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import KVCache
from phi3_jax.infer.serving.engine import EngineOptions, Job, chunks
from phi3_jax.infer.serving.engine.batch import Batch
from phi3_jax.infer.serving.engine.options import Sizes
from phi3_jax.infer.serving.engine.sequence import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS, ROWS, HEADS, LENGTH, HEAD_DIM = 3, 2, 5, 4, 6
CASES = [(12, "int8"), (4, "bfloat16")]  # slots of a row, dtype
NAMES = ["k", "v", "k_scale", "v_scale"]


def bits(array):
    return np.asarray(array).view(np.uint8)


def some_cache(slots, dtype, seed):
    """Every bit pattern, those of NaNs included; no token."""
    rng, shape = np.random.default_rng(seed), (LAYERS, ROWS, HEADS, slots, HEAD_DIM)
    size = jnp.dtype(dtype).itemsize
    k, v = (rng.integers(0, 256, (*shape[:-1], HEAD_DIM * size), np.uint8).view(jnp.dtype(dtype)) for _ in range(2))
    scales = [rng.random(shape[:-1], np.float32) if dtype == "int8" else None for _ in range(2)]
    return KVCache(*jax.tree.map(jnp.asarray, (k, v, np.full((ROWS, slots), -1, np.int32), *scales)))


def names(cache):
    return [name for name in NAMES if getattr(cache, name) is not None]


@pytest.mark.parametrize(("slots", "dtype"), CASES)
def test_a_chunk_is_what_the_slots_of_its_tokens_hold(slots, dtype):
    cache = some_cache(slots, dtype, 1)
    for row, number in ((0, 0), (1, 2), (1, 3), (0, 7)):
        places = np.arange(number * LENGTH, (number + 1) * LENGTH) % slots
        chunk = chunks.take(cache, row, number * LENGTH, LENGTH)
        assert (chunk.k_scale is None) == (chunk.v_scale is None) == (dtype != "int8")
        for name in names(cache):
            np.testing.assert_array_equal(bits(getattr(chunk, name)), bits(getattr(cache, name)[:, row][:, :, places]))
        held = sum(np.asarray(getattr(chunk, name)).nbytes for name in names(cache))
        assert held == chunks.chunk_bytes(cache, LENGTH)


@pytest.mark.parametrize(("slots", "dtype"), CASES)
def test_placed_chunks_lie_in_the_slots_of_their_tokens_and_nothing_else_changes(slots, dtype):
    source, target = some_cache(slots, dtype, 2), some_cache(slots, dtype, 3)
    target = dataclasses.replace(target, positions=jnp.arange(ROWS * slots, dtype=jnp.int32).reshape(ROWS, slots))
    for row, number, count in ((1, 0, 1), (0, 5, slots // LENGTH), (1, 2, max(1, slots // LENGTH - 1))):
        taken = [chunks.take(source, 0, 4 * i, LENGTH) for i in range(count)]
        expected = {name: np.array(getattr(target, name)) for name in [*names(target), "positions"]}
        expected["positions"][row] = -1
        for i, chunk in enumerate(taken):
            for j in range(LENGTH):
                position = (number + i) * LENGTH + j
                expected["positions"][row, position % slots] = position
                for name in names(target):
                    expected[name][:, row, :, position % slots] = np.asarray(getattr(chunk, name))[:, :, j]
        before, target = target, chunks.place(target, row, taken, (number + count) * LENGTH)
        assert before.k.is_deleted()  # donated
        for name, array in expected.items():
            np.testing.assert_array_equal(bits(getattr(target, name)), bits(array), err_msg=name)


def test_one_program_whatever_the_row_and_the_place():
    cache = some_cache(12, "bfloat16", 4)
    chunk = chunks.take(cache, 0, 0, LENGTH)
    cache = chunks.place(cache, 0, [chunk], LENGTH)
    before = chunks._take._cache_size(), chunks._place._cache_size()
    for row, end in ((1, 8), (0, 12), (1, 400)):
        cache = chunks.place(cache, row, [chunks.take(cache, row, end - LENGTH, LENGTH), chunk], end)
    assert before == (chunks._take._cache_size(), chunks._place._cache_size())


def test_placing_needs_no_second_cache():
    cache = KVCache(*[jnp.zeros((31, 3, 2, 496, 8), "bfloat16") for _ in range(2)], jnp.zeros((3, 496), jnp.int32))
    chunk = chunks.take(cache, 0, 0, 16)
    numbers = np.int32(0), np.int32(0), np.bool_(True)
    program = chunks._place.lower(cache, chunk, *numbers).compile().memory_analysis()
    assert program is not None
    assert program.temp_size_in_bytes < 3 * chunks.chunk_bytes(cache, 16)


def test_rows_of_many_chunks_are_copied_whole_into_the_batch(tiny):
    config, slots, options = tiny.config, 300, EngineOptions(slots=2, room=60)
    sizes = dataclasses.replace(Sizes.of(tiny, options), capacity=slots)
    batch = Batch(tiny, sizes, options)
    rng, joined = np.random.default_rng(6), []
    for length in (281, 129):
        row = Row.of(Job([5], 1), lambda piece: None, tiny, sizes)
        row.tokens = [5] * length
        shape = (config.num_hidden_layers, 1, config.num_key_value_heads, slots, config.head_dim)
        k, v = (jnp.asarray(rng.random(shape, np.float32)) for _ in range(2))
        held = np.where(np.arange(slots) < length, np.arange(slots), -1)
        joined.append((length, KVCache(k, v, jnp.asarray(held[None], jnp.int32))))
        batch.join(row, joined[-1][1])
    for row, (length, cache) in enumerate(joined):  # the first has moved to a larger batch since
        np.testing.assert_array_equal(batch._cache.positions[row], cache.positions[0])
        np.testing.assert_array_equal(batch._cache.k[:, row, :, :length], cache.k[:, 0, :, :length])
        np.testing.assert_array_equal(batch._cache.v[:, row, :, :length], cache.v[:, 0, :, :length])


@pytest.mark.parametrize(("window", "slots"), [(None, 40), (1, 4), (3, 8), (4, 8), (5, 8), (6, 12), (9, 12)])
def test_what_the_next_token_sees_is_placed_and_no_older_chunk(window, slots):
    for end in range(0, 40, LENGTH):
        first = chunks.first_needed(LENGTH, end, window)
        seen = [p for p in range(end) if window is None or p > end - window]
        needed = sorted({p // LENGTH for p in seen})
        assert list(range(first, end // LENGTH)) == needed
        assert len(needed) * LENGTH <= slots  # a ring that is read in pieces of a chunk has room for them


def test_what_does_not_fit_is_refused():
    cache = some_cache(8, "float32", 5)
    chunk = chunks.take(cache, 0, 0, LENGTH)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"{count} chunks of"):
            chunks.place(cache, 0, [chunk] * count, 12)
    with pytest.raises(ValueError, match="a chunk of 3 tokens would be cut in two by the end of a row of 8 slots"):
        chunks.take(cache, 0, 0, 3)
    with pytest.raises(ValueError, match="a chunk of 4 tokens would be cut in two by the end of a row of 6 slots"):
        chunks.place(some_cache(6, "float32", 5), 0, [chunk], 4)

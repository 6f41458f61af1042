"""The TPU kernel of attention, interpreted on the CPU, against the reference."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from phi3_jax.kernels.attention import tpu, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

L, K = 3, 2


def filled(lengths: list[int], new: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the newest tokens of rows of these lengths, and of the slots of a full or a ring cache."""
    q, k = np.full((len(lengths), new), -1, np.int32), np.full((len(lengths), slots), -1, np.int32)
    for b, length in enumerate(lengths):
        begin = length - min(length, new)
        q[b, new - length + begin :] = np.arange(begin, length)
        seen = np.arange(max(0, length - slots), length)
        k[b, seen % slots] = seen
    return q, k


def example(
    lengths: list[int], sizes: tuple[int, int, int, int], dtype: Any = np.float32, layer: int | None = 1
) -> tuple[jax.Array, KeysValues, np.ndarray, np.ndarray]:
    """Random queries, and a cache whose heads are padded to 128; in int8 the scales of keys and values differ.

    The sizes are T, S, G and H.
    """
    T, S, G, H = sizes
    random, B, slots = np.random.default_rng(0), len(lengths), (L, len(lengths), K, S)
    q, padding = random.normal(size=(B, T, K * G, H)), [(0, 0)] * 4 + [(0, 128 - H)]
    k, v = (np.pad(random.normal(size=(*slots, H)), padding) for _ in range(2))
    scales = [None, None]
    if dtype == np.int8:
        k, v = (np.clip(np.round(50 * each), -127, 127) for each in (k, v))
        scales = [random.uniform(low, 3 * low, size=slots).astype(np.float32) for low in (0.01, 0.1)]
    leaves = [None if each is None else jnp.asarray(each) for each in (k.astype(dtype), v.astype(dtype), *scales)]
    if layer is None:
        leaves = [None if each is None else each[0] for each in leaves]
    float_type = jnp.float32 if dtype == np.int8 else dtype
    kv = KeysValues(*leaves, layer=None if layer is None else jnp.int32(layer))  # type: ignore[arg-type]
    return jnp.asarray(q, float_type), kv, *filled(lengths, T, S)


@functools.partial(jax.jit, static_argnames="interpret")
def both(q: jax.Array, kv: KeysValues, visible: Visibility, interpret: Any = True) -> tuple[jax.Array, jax.Array]:
    return tpu.attention(q, kv, visible, interpret), xla.attention(q, kv, visible)


def compare(q: jax.Array, kv: KeysValues, visible: Visibility, tolerance: float = 2e-5, interpret: Any = True) -> None:
    got, expected = (np.asarray(each, np.float32) for each in both(q, kv, visible, interpret))
    sees = np.asarray(visible.mask().any(axis=-1))
    assert sees.any()
    assert np.isfinite(got).all()  # padding, too
    np.testing.assert_allclose(got[sees], expected[sees], atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _blocks_of_128_slots(monkeypatch: pytest.MonkeyPatch, quick_compilation: None) -> None:
    monkeypatch.setattr(tpu, "_KEY_BYTES", 1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of queries and of slots, each of one head, as in prefill, at sizes that are interpreted quickly."""
    monkeypatch.setattr(tpu, "_FEW_ROWS", 0)
    monkeypatch.setattr(tpu, "_ROWS", 16)
    monkeypatch.setattr(tpu, "_SLOTS", 128)


@pytest.mark.parametrize(
    ("lengths", "sizes", "window", "dtype", "layer"),
    [
        ([1, 300, 129, 0], (1, 300, 3, 96), None, np.float32, 2),  # ragged, an empty row, a last block that is not full
        ([4, 141, 700], (3, 150, 1, 64), 128, np.int8, 1),  # guesses in a ring
        pytest.param(
            [40, 17], (17, 128, 2, 128), 9, jnp.bfloat16, None, marks=pytest.mark.slow
        ),  # one layer's keys and values
    ],
)
def test_decoding(
    lengths: list[int], sizes: tuple[int, int, int, int], window: int | None, dtype: Any, layer: int | None
) -> None:
    q, kv, q_positions, k_positions = example(lengths, sizes, dtype, layer)
    visible = Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window)
    compare(q, kv, visible, 0.02 if dtype == jnp.bfloat16 else 2e-5)


@pytest.mark.parametrize(
    ("lengths", "sizes", "window", "dtype"),
    [
        ([300, 20], (40, 300, 2, 96), None, np.int8),  # padding on the left; the last block of queries is not full
        pytest.param([430, 7], (37, 170, 1, 64), 130, np.float32, marks=pytest.mark.slow),  # a ring
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_prompts_chunk(lengths: list[int], sizes: tuple[int, int, int, int], window: int | None, dtype: Any) -> None:
    q, kv, q_positions, k_positions = example(lengths, sizes, dtype)
    compare(q, kv, Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window))


@pytest.mark.usefixtures("small_blocks")
def test_segments() -> None:
    q, kv, q_positions, _ = example([150], (150, 150, 1, 64))
    segments = np.arange(150)[None] // 47
    positions, segments = (jnp.asarray(each) for each in (q_positions % 47, segments))
    compare(q, kv, Visibility(positions, positions, segments, segments))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 200])
def test_only_blocks_that_are_seen_are_read(window: int | None) -> None:
    """Everything else is NaN, which one multiplication with 0 would spread: other layers, rows' rests, padding rows."""
    lengths, S, size = [257, 1000, 384, 327], 640, 128
    q, kv, q_positions, k_positions = example(lengths, (1, S, 2, 64))
    visible = Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window)
    needed = np.asarray(visible.mask())[:, 0].reshape(len(lengths), -1, size).any(axis=-1)  # [B, blocks]
    # 257 tokens: blocks 0 to 2, or from 57 on; a ring of the newest 640 of 1000, or 200 of them; exactly 3 blocks; the
    # window's oldest key is the last of block 0.
    assert needed.sum(axis=-1).tolist() == ([3, 5, 3, 3] if window is None else [3, 2, 2, 3])
    kept = np.repeat(needed, size, axis=1)[:, None, :, None] & (np.arange(L) == 1)[:, None, None, None, None]
    kv = KeysValues(*(jnp.where(kept, each, jnp.nan) for each in (kv.k, kv.v)), layer=kv.layer)
    got, _ = both(q, kv, visible)
    clean = KeysValues(*(jnp.nan_to_num(each) for each in (kv.k, kv.v)), layer=kv.layer)
    np.testing.assert_allclose(got, xla.attention(q, clean, visible), atol=2e-5)
    blocks = tpu._Blocks(K, 1, size)
    assert int(tpu._work(visible.q_positions[:, None], visible, blocks)[1]) == needed.sum()


@pytest.mark.parametrize(
    ("q", "k"), [((1, 32, 96), (32, 1152, 128)), ((512, 40, 128), (10, 131072, 128)), ((5, 24, 128), (8, 90, 128))]
)
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_blocks_are_of_sizes_that_the_compiler_takes(
    q: tuple[int, ...], k: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    heads, queries, slots = tpu._block_sizes(jax.ShapeDtypeStruct((1, *q), dtype), jax.ShapeDtypeStruct(k, dtype))
    assert heads in (1, k[0])
    assert slots == k[1] or slots % 128 == 0
    assert queries * heads * q[1] // k[0] <= 1024
    assert heads * slots * k[2] * np.dtype(dtype).itemsize <= 2**21


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 127, 128, 129])
@pytest.mark.parametrize("new", [1, 2])
def test_edges_of_the_window_meet_edges_of_blocks(window: int, new: int) -> None:
    lengths = [128, 129, 130, 255, 256, 257, 258, 384]
    q, kv, q_positions, k_positions = example(lengths, (new, 257, 1, 64))
    compare(q, kv, Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_no_block_is_used_before_it_has_arrived(dtype: Any) -> None:
    q, kv, q_positions, k_positions = example([300, 0, 5], (1, 300, 2, 96), dtype)
    visible = Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions))
    compare(q, kv, visible, interpret=pltpu.InterpretParams(detect_races=True))
    # jax 0.12 raises an error; 0.10 notes it where only this finds it.
    races = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    assert not getattr(races, "races_found", False)

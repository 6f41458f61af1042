"""The sizes of a run's arrays, all from one ladder of powers of two, so that any work runs on few compiled programs.

    B, rows             1, 8, 64, ...; on the CPU, where a row more takes time, 1, 2, 4, 8, ...
    M, tokens of a row  4096, 8192, 16384, ...; at most the model's context
    T, tokens of a read Options.prefill_chunk of a row alone, 128 of several; on the CPU 16, 32, 64, 128, prefill_chunk

The attention kernels read only the slots that are used, so a large cache costs memory alone. Where it would take too
much of that, or where XLA computes attention, which reads every slot, M is the next power of two, or if that is too
much as well, a multiple of 128; and B likewise the next power of two, or the number of rows itself.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint, is_quantized
from phi3_jax.config import Phi3Config
from phi3_jax.kernels.attention import why_not_cpu, why_not_kernels
from phi3_jax.model import slots_needed

from .options import Options

ROOM = 4096  # tokens: the ladder's first room
_SMALLEST_ROOM = 128  # tokens: of rooms that are chosen finely, and their unit at last

# On the CPU, the lengths beside a whole chunk that prompts are read in; and how many tokens could be read in the time
# that a call takes beside that for its tokens, which is mostly that for reading all weights.
_CPU_PIECES, _CPU_CALL = (16, 32, 64, 128), 32
_FEW = 128  # tokens of each of several rows: enough to keep an accelerator busy


def batch_rung(rows: int) -> int:
    """B for so many rows: a power of two on the CPU; elsewhere one of eight, where a row more takes hardly any time."""
    rung, factor = 1, 2 if _platform() == "cpu" else 8
    while rung < rows:
        rung *= factor
    return rung


def room_rung(tokens: int) -> int:
    """The smallest room for so many tokens, if rooms are chosen finely."""
    return max(_SMALLEST_ROOM, _power_of_two(tokens))


def sizes_for(checkpoint: Checkpoint, rows: int, tokens: int, options: Options, dtype: Any) -> tuple[int, int]:
    """(B, M) of a run: the coarsest rungs that take at most half of the memory beside the weights.

    Args:
      tokens: the most tokens, prompt and answer together, of a row.
      dtype: of the cache.
    """
    config, rows = checkpoint.config, max(rows, options.rows, 1)
    tokens, context = max(tokens, options.room), config.max_position_embeddings
    exact = _round_up(tokens, _SMALLEST_ROOM)
    rooms = [min(room, max(tokens, context)) + options.guesses for room in (room_rung(tokens), exact)]
    if why_not_kernels(dtype, config.head_dim) is None:
        rooms.insert(0, min(max(ROOM, _power_of_two(tokens)), max(tokens, context)) + options.guesses)
    spare = (_memory() - _size(checkpoint.params)) / 2
    for batch in (batch_rung(rows), _power_of_two(rows)):
        for room in rooms:
            slots = slots_needed(config, room, most_at_once(options))
            if batch * (slots * slot_bytes(config, dtype) + _read_bytes(config, batch, options)) <= spare:
                return batch, room
    return rows, rooms[-1]


def rows_that_fit(checkpoint: Checkpoint, tokens: int, dtype: Any, most: int) -> int:
    """The largest power of two, up to `most`, of rows of so many tokens that take half of the memory beside weights."""
    spare = (_memory() - _size(checkpoint.params)) / 2
    row = slots_needed(checkpoint.config, tokens, most_at_once(Options())) * slot_bytes(checkpoint.config, dtype)
    return max(1, min(most, _power_of_two(int(spare / row) + 1) // 2))


def most_at_once(options: Options) -> int:
    """The most tokens of a row that are written to its cache at once."""
    return max(options.prefill_chunk, options.guesses + 2)


def piece_length(tokens: int, rows: int, chunk: int, capacity: int) -> int:
    """The length of the next piece to read when `tokens` are still to be read; longer if that saves calls and time."""
    most = min(most_to_read(rows, chunk), capacity)
    if _platform() != "cpu":
        return most
    pieces = [*(piece for piece in _CPU_PIECES if piece < most), most]
    if tokens <= pieces[0] or tokens >= most:
        return pieces[0] if tokens <= pieces[0] else most
    longer = next(i for i, piece in enumerate(pieces) if piece > tokens)
    short, long = pieces[longer - 1], pieces[longer]
    return long if _CPU_CALL + long <= -(-tokens // short) * (_CPU_CALL + short) else short


def most_to_read(rows: int, chunk: int) -> int:
    """The most tokens of a row that are read at a time: on accelerators several rows have enough in few of each."""
    return chunk if rows == 1 or _platform() == "cpu" else min(chunk, _FEW)


def own_cache_dtype(checkpoint: Checkpoint) -> Any:
    """The default dtype of the cache: bfloat16 for quantised weights, else the weights' own.

    On the CPU without kernels it is float32, because XLA converts a whole bfloat16 cache to float32 to write to it.
    """
    params = checkpoint.params
    if _platform() == "cpu" and why_not_cpu("bfloat16") is not None:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16) if is_quantized(params) else params["embed_tokens"]["weight"].dtype


def _platform() -> str:
    return jax.default_backend()


def _memory() -> int:
    """Bytes of the first device's memory."""
    stats = jax.local_devices()[0].memory_stats()  # None on the CPU
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def slot_bytes(config: Phi3Config, dtype: Any) -> int:
    """Bytes of a row's slot, in all layers: keys, values, and with int8 their scales."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def _read_bytes(config: Phi3Config, rows: int, options: Options) -> int:
    """About what reading a chunk takes for each row: one layer's activations, and with `echo` the logits."""
    numbers = 4 * config.hidden_size + 3 * config.intermediate_size + (config.vocab_size if options.echo else 0)
    return most_to_read(rows, options.prefill_chunk) * numbers * 4


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

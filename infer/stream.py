"""Runs prompts through the compiled functions of decoding.py, and hands out the new tokens while they come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.cache import slots_needed
from phi3_jax.checkpoint import Checkpoint

from . import decoding
from .sampling import Sampling, SamplingParams

PREFILL_CHUNK = 512
CACHE_DTYPES = (None, "float32", "bfloat16", "float16", "int8")
# Steps per call of the compiled loop. Between calls the host can stop, so Ctrl-C waits for at most this many tokens.
_STEPS = 32
_SMALLEST_BUCKET = 16  # tokens; prompts are padded to a power of two from here on, so that few programs are compiled
_ROOM_UNIT = 128  # tokens; the room for the answers is rounded up to a multiple, for the same reason


@dataclasses.dataclass
class Timings:
    """Seconds spent by a run, filled in while it goes on: compiling, reading the prompts, writing the answers."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


def stream(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sequence[Sampling] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cache_dtype: str | None = None,
    steps: int = _STEPS,
    is_over: Callable[[int], bool] | None = None,
    timings: Timings | None = None,
) -> Iterator[list[list[int]]]:
    """As `generate`, from token ids, yielding each row's new tokens after every `steps` of them.

    Args:
      sampling: how each row picks its tokens; greedily if None.
      is_over: asked for every row after each yield; True ends the row.
      timings: filled in while the run goes on.
    """
    timings = Timings() if timings is None else timings
    _check(checkpoint, prompts, max_new_tokens, prefill_chunk, cache_dtype)
    if not prompts:
        return
    config, params = checkpoint.config, checkpoint.params
    limits = [min(max_new_tokens, config.max_position_embeddings - len(prompt)) for prompt in prompts]
    longest = max(map(len, prompts))
    padded = _padded_length(longest, prefill_chunk) if longest <= prefill_chunk else _round_up(longest, prefill_chunk)
    total = padded + _round_up(max(limits), _ROOM_UNIT)
    settings = decoding.Settings(
        limits=jnp.asarray(limits, jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        sampling=SamplingParams.of(sampling or [Sampling()] * len(prompts), config.vocab_size),
        prompt_lengths=jnp.asarray([len(prompt) for prompt in prompts], jnp.int32),
    )
    dtype = _default_cache_dtype(checkpoint) if cache_dtype is None else jnp.dtype(cache_dtype)
    capacity = slots_needed(config, total, prefill_chunk)
    state = decoding.begin(config, settings, _piece(prompts, 0, total)[0], capacity, dtype)
    state = _read_rows(checkpoint, state, prompts, settings, prefill_chunk, timings, "prefill")
    rows = [list(prompt) for prompt in prompts]
    while True:
        new = _new_tokens(state, rows)
        yield new
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
        if is_over is not None and (over := [is_over(i) for i in range(len(rows))]) != [False] * len(rows):
            state = dataclasses.replace(state, done=state.done | jnp.asarray(over))
        if bool(state.done.all()):
            return
        if bool(decoding.must_restart(config, state)):
            state = _read_rows(checkpoint, state, rows, settings, prefill_chunk, timings, "decode")
        else:
            state = _timed(timings, "decode", decoding.decode, config, params, state, settings, jnp.int32(steps))


def _default_cache_dtype(checkpoint: Checkpoint) -> jnp.dtype:
    """The weights' own, but float32 on the CPU, where XLA turns all of a bfloat16 cache into float32 to write to it."""
    own = checkpoint.params["embed_tokens"]["weight"].dtype
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else own


def _read_rows(
    checkpoint: Checkpoint,
    state: decoding.DecodeState,
    rows: Sequence[Sequence[int]],
    settings: decoding.Settings,
    chunk: int,
    timings: Timings,
    phase: str,
) -> decoding.DecodeState:
    """Reads whole rows into an emptied cache, chunk by chunk, and takes the next token of each."""
    config, params = checkpoint.config, checkpoint.params
    cache = dataclasses.replace(state.cache, positions=jnp.full_like(state.cache.positions, -1))
    last = jnp.zeros((len(rows), config.hidden_size), params["embed_tokens"]["weight"].dtype)
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    longest = max(map(len, rows))
    for begin in range(0, longest, chunk):
        piece = _piece(rows, begin, _padded_length(longest - begin, chunk))
        cache, last = _timed(timings, phase, decoding.read, config, params, cache, last, *piece, lengths)
    state = dataclasses.replace(state, cache=cache)
    return _timed(timings, phase, decoding.answer, config, params, state, last, settings)


def _check(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    prefill_chunk: int,
    cache_dtype: str | None,
) -> None:
    config = checkpoint.config
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype={cache_dtype!r} is not one of {CACHE_DTYPES}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give it at least one token")
        if len(prompt) >= config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for an answer in the model's context of "
                f"{config.max_position_embeddings}: shorten it"
            )
        if outside := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise ValueError(f"prompt {i} has ids {outside[:5]} outside of the vocabulary of {config.vocab_size}")


def _padded_length(tokens: int, chunk: int) -> int:
    """The length that a piece of a prompt is padded to: a power of two, the chunk at most."""
    return min(chunk, max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()))


def _piece(rows: Sequence[Sequence[int]], begin: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `begin` to `begin + length` of every row -> (tokens, positions), int32 [B, T]; -1 past a row's end."""
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        ids = row[begin : begin + length]
        tokens[i, : len(ids)] = ids
        positions[i, : len(ids)] = np.arange(begin, begin + len(ids))
    return jnp.asarray(tokens), jnp.asarray(positions)


def _new_tokens(state: decoding.DecodeState, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    return [all_[len(old) : n].tolist() for all_, n, old in zip(tokens, lengths, rows, strict=True)]


def _timed(timings: Timings, phase: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a jitted function, and books its compilation and its run apart."""
    begin = time.perf_counter()
    # Compiles where that has not happened yet; the call below finds the program.
    function.lower(*args, **kwargs).compile()
    compiled = time.perf_counter()
    result = jax.block_until_ready(function(*args, **kwargs))
    timings.compile += compiled - begin
    setattr(timings, phase, getattr(timings, phase) + time.perf_counter() - compiled)
    return result


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

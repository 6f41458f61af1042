"""Text in, text out: prompts are tokenised, run through the compiled functions of decoding.py, and decoded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.cache import slots_needed
from phi3_jax.checkpoint import Checkpoint

from . import decoding

Prompt = str | Sequence[int]
PREFILL_CHUNK = 512
CACHE_DTYPES = (None, "float32", "bfloat16", "float16", "int8")
# Steps per call of the compiled loop. Between calls the host can stop, so Ctrl-C waits for at most this many tokens.
_STEPS = 32
_SMALLEST_BUCKET = 16  # tokens; prompts are padded to a power of two from here on, so that few programs are compiled
_ROOM_UNIT = 128  # tokens; the room for the answers is rounded up to a multiple, for the same reason


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the decoded new tokens, without special tokens.
      token_ids: the new tokens, the end token included if there was one.
      finish_reason: "stop" for an end token, "length" for a limit reached (max_new_tokens, or the model's context).
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass
class Timings:
    """Seconds spent by a run, filled in while it goes on: compiling, reading the prompts, writing the answers."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


def generate(
    checkpoint: Checkpoint,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    cache_dtype: str | None = None,
) -> list[Generation]:
    """Continues prompts.

    Args:
      prompts: text or token ids, one or several; several run as one batch. Text is not parsed for special tokens; for a
        chat pass the ids of `phi3_jax.encode_chat`.
      max_new_tokens: the most tokens of each answer.
      temperature: 0 for the most likely token at each step, else the softmax temperature to draw with.
      seed: of the random draws; the same seed gives the same answers.
      prefill_chunk: how many tokens of the prompts are read at a time, which bounds the memory that reading takes.
      cache_dtype: "float32", "bfloat16", "float16" or "int8" for the keys and values; by default the weights' own.

    Returns:
      one `Generation` for each prompt, in order.

    Raises:
      ValueError: a prompt is empty, has ids outside of the vocabulary, or fills the model's context; text was given but
        the checkpoint has no tokenizer; a number makes no sense.
    """
    ids = [encode_prompt(checkpoint, prompt) for prompt in _as_list(prompts)]
    answers: list[list[int]] = [[] for _ in ids]
    steps = stream(
        checkpoint, ids, max_new_tokens, temperature, seed, prefill_chunk=prefill_chunk, cache_dtype=cache_dtype
    )
    for new in steps:
        for answer, tokens in zip(answers, new, strict=True):
            answer.extend(tokens)
    return [_generation(checkpoint, answer) for answer in answers]


def stream(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    cache_dtype: str | None = None,
    steps: int = _STEPS,
    timings: Timings | None = None,
) -> Iterator[list[list[int]]]:
    """As `generate`, from token ids, yielding each row's new tokens after every `steps` of them."""
    timings = Timings() if timings is None else timings
    _check(checkpoint, prompts, max_new_tokens, temperature)
    _check_memory_options(prefill_chunk, cache_dtype)
    if not prompts:
        return
    config, params = checkpoint.config, checkpoint.params
    limits = [min(max_new_tokens, config.max_position_embeddings - len(prompt)) for prompt in prompts]
    room = _round_up(max(limits), _ROOM_UNIT)
    longest = max(map(len, prompts))
    padded = _padded_length(longest, prefill_chunk) if longest <= prefill_chunk else _round_up(longest, prefill_chunk)
    capacity = slots_needed(config, padded + room, prefill_chunk)
    settings = decoding.Settings(
        limits=jnp.asarray(limits, jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        temperature=jnp.float32(temperature),
        keys=jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(prompts))),
    )
    dtype = params["embed_tokens"]["weight"].dtype if cache_dtype is None else jnp.dtype(cache_dtype)
    state = decoding.begin(config, settings, capacity, room, dtype)
    state = _read_rows(checkpoint, state, prompts, settings, prefill_chunk, timings, "prefill")
    answers: list[list[int]] = [[] for _ in prompts]
    while True:
        new = _new_tokens(state, answers)
        yield new
        for answer, tokens in zip(answers, new, strict=True):
            answer.extend(tokens)
        if bool(state.done.all()):
            return
        if bool(decoding.must_restart(config, state)):
            longer = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
            state = _read_rows(checkpoint, state, longer, settings, prefill_chunk, timings, "decode")
        else:
            state = _timed(timings, "decode", decoding.decode, config, params, state, settings, jnp.int32(steps))


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


def encode_prompt(checkpoint: Checkpoint, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids pass through. Raises ValueError if there is text but no tokenizer."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if checkpoint.tokenizer is None:
        raise ValueError(
            "the checkpoint has no tokenizer: put tokenizer.json or tokenizer.model into its folder, or pass token ids"
        )
    return checkpoint.tokenizer.encode(prompt)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int | np.integer) else items


def _check(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    config = checkpoint.config
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
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


def _check_memory_options(prefill_chunk: int, cache_dtype: str | None) -> None:
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype={cache_dtype!r} is not one of {CACHE_DTYPES}")


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


def _new_tokens(state: decoding.DecodeState, answers: list[list[int]]) -> list[list[int]]:
    output, counts = np.asarray(state.output), np.asarray(state.counts)
    return [row[len(old) : n].tolist() for row, n, old in zip(output, counts, answers, strict=True)]


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


def _generation(checkpoint: Checkpoint, ids: list[int]) -> Generation:
    ended = bool(ids) and ids[-1] in checkpoint.generation.eos_token_ids
    text = checkpoint.tokenizer.decode(ids, skip_special_tokens=True) if checkpoint.tokenizer else ""
    return Generation(text, ids, "stop" if ended else "length")

"""Caches with a prefix in them, for the tests of prompt_cache.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax import KVCache
from phi3_jax.infer.engine import PromptCache

DTYPES = ["float32", "bfloat16", "float16", "int8"]
BORDER = 16  # of the tiny model's LongRoPE
CHUNK = 4


@functools.partial(jax.jit, static_argnums=0)
def extend(config, params, tokens, positions, cache, length):
    """Reads more tokens [B, T] of sequences that will have `length` tokens."""
    rope_lengths = jnp.broadcast_to(length, (len(tokens), 1))
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, positions, cache=cache, rope_lengths=rope_lengths)


@functools.partial(jax.jit, static_argnums=0)
def without_cache(config, params, tokens, positions):
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, positions)


def ids(seed, *shape):
    return np.random.default_rng(seed).integers(4, 97, shape)


def with_window(tiny, window):
    return dataclasses.replace(tiny.config, sliding_window=window)


def read(config, params, tokens, cache, length):
    """Reads tokens [B, T] chunk by chunk -> (logits [B, T, V], cache)."""
    parts, start = [], int(cache.lengths[0])
    for begin in range(0, tokens.shape[1], CHUNK):
        piece = tokens[:, begin : begin + CHUNK]
        room = ((0, 0), (0, CHUNK - piece.shape[1]))
        positions = np.broadcast_to(np.arange(piece.shape[1]) + begin + start, piece.shape)
        positions = np.pad(positions, room, constant_values=-1)
        logits, cache = extend(config, params, np.pad(piece, room), positions, cache, length)
        parts.append(np.asarray(logits)[:, : piece.shape[1]])
    return np.concatenate(parts, axis=1), cache


def read_prefix(config, params, prefix, length, slots, rows=1, row=0, dtype="float32"):
    """A cache with `prefix` in one of its rows, and other tokens in the others."""
    batch = ids(77, rows, len(prefix))
    batch[row] = prefix
    return read(config, params, batch, KVCache.create(config, rows, slots, dtype), length)[1]


def take_prefix(config, params, prefix, length, slots, rows=1, row=0, dtype="float32"):
    """The prompt cache of such a row, whose newest token has no keys yet; the other rows are shorter."""
    cache = read_prefix(config, params, prefix, length, slots, rows, row, dtype)
    others = np.arange(rows)[:, None] != row
    cache = dataclasses.replace(cache, positions=jnp.where(others & (cache.positions >= 3), -1, cache.positions))
    return PromptCache.take(cache, row, [*prefix, 50], length > BORDER, "model")


def ask(config, params, prompt, count, prefix, length, slots, rows):
    """Logits [B, Q, V] of different questions after one placed prefix, and those of reading all without a cache."""
    questions = ids(88, rows, length - count)
    logits, _ = read(config, params, questions, prompt.place(KVCache.create(config, rows, slots), count), length)
    expected = []
    for question in questions:
        tokens, positions = np.zeros((1, 37), np.int32), np.full((1, 37), -1)
        tokens[0, :length], positions[0, :length] = [*prefix[:count], *question], np.arange(length)
        expected.append(without_cache(config, params, tokens, positions)[0, count:length])
    return logits, np.asarray(expected)

"""Rows as the compiled functions are given them: `Settings`, and the state that is made anew whenever rows change.

Arrays are made by numpy, and all have one size for each number of rows, so that nothing is compiled for a job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache

from ...engine.decoding import DecodeState, Settings
from ...engine.news import no_news
from ...sampling import Sampling, SamplingArrays
from ...sampling.logprobs import LogprobRecord
from .options import Sizes
from .sequence import Row


def settings_of(rows: Sequence[Row | None], checkpoint: Checkpoint, sizes: Sizes) -> Settings:
    """The settings of rows; None is a row that is not used. Their grammars, if they have any, are not asked."""
    nothing = Sampling()
    asked = [nothing if row is None else row.job.sampling for row in rows]
    sampling = SamplingArrays.of(asked, checkpoint.config.vocab_size, sizes.most_biases, sizes.most_listed)
    allowed = jnp.asarray(np.full((len(rows), mask_words(checkpoint)), 0xFFFFFFFF, np.uint32))
    return Settings(
        limits=jnp.asarray([0 if row is None else row.limit for row in rows], jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        # The program that serves all settings: what one row asks for must not compile another.
        sampling=dataclasses.replace(sampling, allowed=allowed, plain=False, longest_ngram=None),
        prompt_lengths=jnp.asarray([0 if row is None else len(row.job.prompt) for row in rows], jnp.int32),
    )


def by_grammar(settings: Settings, rows: Sequence[Row | None], checkpoint: Checkpoint) -> Settings:
    """The settings with what the rows' grammars allow as the next token."""
    words = mask_words(checkpoint)
    everything = np.full(words, 0xFFFFFFFF, np.uint32)
    allowed = np.stack([everything if row is None else row.allowed(words) for row in rows])
    return dataclasses.replace(settings, sampling=settings.sampling.by_grammar(jnp.asarray(allowed)))


def mask_words(checkpoint: Checkpoint) -> int:
    """W, words of a grammar's mask."""
    return -(-checkpoint.config.vocab_size // 32)


def record_of(rows: Sequence[Row | None], sizes: Sizes) -> LogprobRecord:
    """For the log-probabilities of the tokens of one call; the program looks when it runs whether a row wants any."""
    shape = (len(rows), sizes.at_once, sizes.top_logprobs)
    chosen, ids, top = np.zeros(shape[:2], np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    return LogprobRecord(jnp.asarray(chosen), jnp.asarray(ids), jnp.asarray(top), wants_logprobs(rows))


def wants_logprobs(rows: Sequence[Row | None]) -> jax.Array:
    """Whether any row wants log-probabilities: bool scalar."""
    return jnp.asarray(np.bool_(any(row is not None and row.job.logprobs is not None for row in rows)))


def state_of(rows: Sequence[Row | None], sizes: Sizes, cache: KVCache, record: LogprobRecord | None) -> DecodeState:
    """The state of rows whose keys and values are in `cache`; None is a row that is not used."""
    B = len(rows)
    tokens, lengths, rope = np.zeros((B, sizes.width), np.int32), np.ones(B, np.int32), np.zeros(B, np.int32)
    done = np.ones(B, bool)
    for place, row in enumerate(rows):
        if row is not None:
            lengths[place] = len(row.tokens)
            tokens[place, : lengths[place]] = row.tokens
            done[place] = len(row.tokens) - len(row.job.prompt) >= row.limit
            if sizes.border is not None:
                # The factors of a row's keys are those it was read with, and stay so until it is read again.
                rope[place] = sizes.border + 1 if row.was_long else min(sizes.border, len(row.tokens))
    return DecodeState(
        cache=cache,
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        done=jnp.asarray(done),
        rope_lengths=jnp.asarray(rope),
        # Each an array of its own, because the state is donated.
        offered=jnp.asarray(np.zeros(B, np.int32)),
        taken=jnp.asarray(np.zeros(B, np.int32)),
        failed=jnp.asarray(np.zeros(B, np.int32)),
        news=no_news(B),
        logprobs=record,
    )


def no_cache(config: Phi3Config, dtype: Any) -> KVCache:
    """A cache of one row without a slot, for a function that does not look at it."""
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 0, config.head_dim)
    k, v = (jnp.asarray(np.zeros(shape, dtype)) for _ in range(2))
    scales = [jnp.asarray(np.zeros(shape[:-1], np.float32)) if k.dtype == jnp.int8 else None for _ in range(2)]
    return KVCache(k, v, jnp.asarray(np.zeros((1, 0), np.int32)), *scales)

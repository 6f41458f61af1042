"""Rows as the compiled functions are given them: `Settings`, and the state that is made anew whenever rows change.

Arrays are made by numpy, and all have one size for each number of rows, so that nothing is compiled for a job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

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
    """The settings of rows; None is a row that is not used."""
    nothing = Sampling()
    asked = [nothing if row is None else row.job.sampling for row in rows]
    sampling = SamplingArrays.of(asked, checkpoint.config.vocab_size, sizes.most_biases, sizes.most_listed)
    return Settings(
        limits=jnp.asarray([0 if row is None else row.limit for row in rows], jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        # The program that serves all settings: what one row asks for must not compile another.
        sampling=dataclasses.replace(sampling, plain=False, longest_ngram=None),
        prompt_lengths=jnp.asarray([0 if row is None else len(row.job.prompt) for row in rows], jnp.int32),
    )


def state_of(rows: Sequence[Row | None], sizes: Sizes, cache: KVCache, logprobs: int | None) -> DecodeState:
    """The state of rows whose keys and values are in `cache`; None is a row that is not used.

    Args:
      logprobs: record the log-probabilities of tokens and of so many likely ones; None records nothing.
    """
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
        logprobs=None if logprobs is None else LogprobRecord.create(B, sizes.width, logprobs),
    )


def no_cache(config: Phi3Config, dtype: Any) -> KVCache:
    """A cache of one row without a slot, for a function that does not look at it."""
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 0, config.head_dim)
    k, v = (jnp.asarray(np.zeros(shape, dtype)) for _ in range(2))
    scales = [jnp.asarray(np.zeros(shape[:-1], np.float32)) if k.dtype == jnp.int8 else None for _ in range(2)]
    return KVCache(k, v, jnp.asarray(np.zeros((1, 0), np.int32)), *scales)

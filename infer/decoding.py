"""Compiled decoding: `read` takes in the prompts, chunk by chunk; `decode` writes the answers, one loop on the device.

    begin -> read, read, ... -> answer -> decode, decode, ...   (back to read where LongRoPE's border is crossed)

Axis letters: B batch, T prompt, S cache slot, M tokens of prompt and answer together, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.model import Phi3

from .sampling import SamplingParams, pick

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same for a whole run.

    Attributes:
      limits: int32 [B]: how many new tokens each row may have.
      end_ids: int32 [E]: the ids that end an answer.
      sampling: how each row picks its tokens.
      prompt_lengths: int32 [B].
    """

    limits: jax.Array
    end_ids: jax.Array
    sampling: SamplingParams
    prompt_lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a run stands.

    Attributes:
      cache: keys and values of every token but the newest of each row.
      tokens: int32 [B, M]: prompt and answer so far; only the first `lengths` of a row mean something.
      lengths: int32 [B].
      done: bool [B]: the row has met an end id or its limit, or was ended from outside.
    """

    cache: KVCache
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array


def begin(config: Phi3Config, settings: Settings, prompts: jax.Array, capacity: int, dtype: Any) -> DecodeState:
    """The state before anything is read.

    Args:
      prompts: int32 [B, M], with room for the answers on the right.
      capacity: S, slots of the cache (`cache.slots_needed`).
      dtype: of the cache: a float type or int8.
    """
    return DecodeState(
        cache=KVCache.create(config, len(prompts), capacity, dtype),
        tokens=prompts,
        lengths=settings.prompt_lengths + 0,  # a buffer of its own, because the state is donated
        done=settings.limits <= 0,
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "last"))
def read(
    config: Phi3Config,
    params: Params,
    cache: KVCache,
    last: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Reads one chunk of every row.

    Args:
      last: [B, D], the model's output at the last token of the rows whose last token has come by; others mean nothing.
      tokens: int32 [B, T].
      positions: int32 [B, T], -1 where a row has ended.
      lengths: int32 [B], of the whole rows: LongRoPE decides by the tokens to come, too.

    Returns:
      cache and last, brought up to date.
    """
    model = Phi3(config)
    result: Any = model.apply(
        {"params": params}, tokens, positions, cache=cache, rope_lengths=lengths[:, None], method="hidden"
    )
    x, cache, _ = result
    # Only the last token's logits are wanted; a whole prompt's would take T x V floats.
    is_last = positions == lengths[:, None] - 1
    at_last = jnp.take_along_axis(x, is_last.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(is_last.any(axis=1)[:, None], at_last, last)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def answer(config: Phi3Config, params: Params, state: DecodeState, last: jax.Array, settings: Settings) -> DecodeState:
    """Takes the next token of each row after reading: last [B, D] is what `read` returned."""
    logits: Any = Phi3(config).apply({"params": params}, last, method="unembed")
    return _advance(state, logits, settings)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(config: Phi3Config, params: Params, state: DecodeState, settings: Settings, steps: jax.Array) -> DecodeState:
    """Takes up to `steps` (int32 scalar) more tokens, until all rows are done or one must be restarted."""

    def more(loop: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = loop
        return (step < steps) & ~state.done.all() & ~must_restart(config, state)

    def body(loop: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = loop
        newest = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        # A row that is done runs along with the others; position -1 keeps its token out of the cache.
        positions = jnp.where(state.done, -1, state.cache.lengths)[:, None]
        result: Any = Phi3(config).apply({"params": params}, newest, positions, cache=state.cache)
        logits, cache = result
        return step + 1, _advance(dataclasses.replace(state, cache=cache), logits[:, 0], settings)

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def must_restart(config: Phi3Config, state: DecodeState) -> jax.Array:
    """Whether some row's next token is the first beyond LongRoPE's border: bool scalar."""
    if config.long_rope is None:
        return jnp.asarray(False)
    border = config.long_rope.original_max_position_embeddings
    return (~state.done & (state.cache.lengths == border)).any()


def _advance(state: DecodeState, logits: jax.Array, settings: Settings) -> DecodeState:
    """Adds one token, picked from logits [B, V], to every row that is not done."""
    token = pick(logits, settings.sampling, state.tokens, state.lengths, settings.prompt_lengths, settings.end_ids)
    rows = jnp.arange(token.shape[0])
    # Rows that are done write past the end, where the scatter drops it.
    slot = jnp.where(state.done, state.tokens.shape[1], state.lengths)
    lengths = state.lengths + ~state.done
    ended = (token[:, None] == settings.end_ids).any(axis=-1)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
        lengths=lengths,
        done=state.done | ended | (lengths - settings.prompt_lengths >= settings.limits),
    )

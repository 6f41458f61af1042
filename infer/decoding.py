"""Compiled decoding: `start` reads the prompts, `decode` writes the answers, one loop on the device.

Axis letters: B batch, T prompt, S cache slot, M the most new tokens, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.masks import positions_from_mask
from phi3_jax.model import Phi3

from .sampling import sample

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same for a whole run.

    Attributes:
      limits: int32 [B]: how many new tokens each row may have.
      end_ids: int32 [E]: the ids that end an answer.
      temperature: float32 scalar.
      keys: a random key for each row, [B].
    """

    limits: jax.Array
    end_ids: jax.Array
    temperature: jax.Array
    keys: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a run stands.

    Attributes:
      cache: keys and values of every token but the newest of each row.
      output: int32 [B, M]: the new tokens; only the first `counts` of a row mean something.
      counts: int32 [B]: how many new tokens each row has.
      done: bool [B]: the row has met an end id or its limit.
    """

    cache: KVCache
    output: jax.Array
    counts: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "capacity", "room"))
def start(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    settings: Settings,
    *,
    capacity: int,
    room: int,
) -> DecodeState:
    """Reads the prompts into a new cache and takes the first new token of each row.

    Args:
      tokens: int32 [B, T], rows padded on the right to one length bucket.
      lengths: int32 [B]: how many of a row's tokens are real, at least 1.
      capacity: S, slots of the cache: prompt and answer of the longest row must fit.
      room: M, the most new tokens that any row may have.
    """
    rows = tokens.shape[0]
    cache = KVCache.create(config, rows, capacity, params["embed_tokens"]["weight"].dtype)
    cache, logits = _read(config, params, cache, tokens, lengths)
    empty = DecodeState(
        cache=cache,
        output=jnp.zeros((rows, room), jnp.int32),
        counts=jnp.zeros((rows,), jnp.int32),
        done=settings.limits <= 0,
    )
    return _advance(empty, logits, settings)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def restart(
    config: Phi3Config, params: Params, state: DecodeState, tokens: jax.Array, lengths: jax.Array, settings: Settings
) -> DecodeState:
    """One step that computes everything anew, for when a row crosses LongRoPE's border: then all its keys change.

    Args:
      tokens, lengths: as in `start`, but prompt and answer so far.
    """
    cache = dataclasses.replace(state.cache, positions=jnp.full_like(state.cache.positions, -1))
    cache, logits = _read(config, params, cache, tokens, lengths)
    return _advance(dataclasses.replace(state, cache=cache), logits, settings)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(config: Phi3Config, params: Params, state: DecodeState, settings: Settings, steps: jax.Array) -> DecodeState:
    """Takes up to `steps` (int32 scalar) more tokens, until all rows are done or one must be restarted."""

    def more(loop: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = loop
        return (step < steps) & ~state.done.all() & ~must_restart(config, state)

    def body(loop: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = loop
        newest = jnp.take_along_axis(state.output, jnp.maximum(state.counts - 1, 0)[:, None], axis=1)
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


def _read(
    config: Phi3Config, params: Params, cache: KVCache, tokens: jax.Array, lengths: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Runs whole sequences through the model -> (cache, logits after each row's last token [B, V])."""
    positions = positions_from_mask(jnp.arange(tokens.shape[1]) < lengths[:, None])
    model = Phi3(config)
    result: Any = model.apply({"params": params}, tokens, positions, cache=cache, method="hidden")
    x, cache, _ = result
    # Only the last token's logits are wanted; a whole prompt's would take T x V floats.
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits: Any = model.apply({"params": params}, last, method="unembed")
    return cache, logits


def _advance(state: DecodeState, logits: jax.Array, settings: Settings) -> DecodeState:
    """Adds one token, picked from logits [B, V], to every row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(settings.keys, state.counts)
    token = sample(logits, keys, settings.temperature)
    rows = jnp.arange(token.shape[0])
    # Rows that are done write past the end, where the scatter drops it.
    slot = jnp.where(state.done, state.output.shape[1], state.counts)
    counts = state.counts + ~state.done
    ended = (token[:, None] == settings.end_ids).any(axis=-1)
    return dataclasses.replace(
        state,
        output=state.output.at[rows, slot].set(token, mode="drop"),
        counts=counts,
        done=state.done | ended | (counts >= settings.limits),
    )

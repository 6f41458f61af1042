"""What a run is made of: its settings, and its state between two calls of the compiled functions (decoding.py).

Axis letters: B batch, S cache slot, E end ids, M tokens of prompt and answer together, V vocab.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache
from phi3_jax.model.points import Edit, Hooks

from ..sampling import SamplingArrays
from ..sampling.logprobs import LogprobRecord
from .news import no_news

RopePolicy = Literal["length", "capacity", "batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same for a whole run.

    Attributes:
      limits: int32 [B]: how many new tokens each row may have.
      end_ids: int32 [E]: the ids that end an answer.
      sampling: how each row picks its tokens.
      prompt_lengths: int32 [B].
      rope_policy: which number of tokens decides a row's LongRoPE factors: "length", its own; "capacity", that which it
        may grow to; "batch", that of the longest row, padding of finished rows included.
      edits: changes of values inside of the model, the same for all rows (phi3_jax.inspection); not of a drafter's.
      watched: uint8 [V], of `sampling.watched_tokens`: `decode` returns after a token that may complete a stop string.
    """

    limits: jax.Array
    end_ids: jax.Array
    sampling: SamplingArrays
    prompt_lengths: jax.Array
    rope_policy: RopePolicy = dataclasses.field(default="length", metadata={"static": True})
    watched: jax.Array | None = None
    edits: tuple[Edit, ...] = ()

    def rope_lengths(self, lengths: jax.Array) -> jax.Array:
        """The numbers of tokens that decide the LongRoPE factors of rows of `lengths` tokens: int32 [B]."""
        if self.rope_policy == "capacity":
            return self.prompt_lengths + self.limits
        if self.rope_policy == "batch":
            width = self.prompt_lengths.max() + (lengths - self.prompt_lengths).max()
            return jnp.broadcast_to(width, lengths.shape)
        return lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of a run.

    Attributes:
      cache: keys and values of every token but the newest of each row.
      tokens: int32 [B, M]: prompt and answer so far; only the first `lengths` of a row are valid.
      lengths: int32 [B].
      done: bool [B]: the row has met an end id or its limit, or was ended from outside.
      rope_lengths: int32 [B]: the numbers of tokens that decided the LongRoPE factors of the keys in the cache.
      offered, taken: int32 [B]: how many guesses of a drafter were tried, and how many of them kept.
      failed: int32 [B]: 0, or why a row is done that could not go on: a flag of failures.py.
      news: int32 [B, ...]: what the last call did, for the host (news.py).
      logprobs: the tokens' log-probabilities, if they are wanted.
    """

    cache: KVCache
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    rope_lengths: jax.Array
    offered: jax.Array
    taken: jax.Array
    failed: jax.Array
    news: jax.Array
    logprobs: LogprobRecord | None = None


def begin(
    config: Phi3Config,
    settings: Settings,
    tokens: jax.Array,
    capacity: int,
    dtype: Any,
    logprobs: int | None = None,
    unset: bool = False,
) -> DecodeState:
    """The state before anything is read.

    Args:
      tokens: int32 [B, M]: the prompts, with room for the answers on the right.
      capacity: S, slots of the cache (`cache.slots_needed`); dtype and `unset`: see `KVCache.create`.
      logprobs: how many of the most likely tokens are recorded with each token; None records nothing.
    """
    lengths = settings.prompt_lengths
    record = None if logprobs is None else LogprobRecord.create(len(tokens), tokens.shape[1], logprobs)
    # + 0 makes copies, because the state is donated.
    return DecodeState(
        cache=KVCache.create(config, len(tokens), capacity, dtype, unset),
        tokens=tokens,
        lengths=lengths + 0,
        done=settings.limits <= 0,
        rope_lengths=settings.rope_lengths(lengths) + 0,
        offered=jnp.zeros_like(lengths),
        taken=jnp.zeros_like(lengths),
        failed=jnp.zeros_like(lengths),
        news=no_news(len(tokens)),
        logprobs=record,
    )


def restart(state: DecodeState, settings: Settings) -> DecodeState:
    """The state with an empty cache, to read all tokens again with the LongRoPE factors of their present number."""
    empty = jnp.full_like(state.cache.positions, -1)
    cache = dataclasses.replace(state.cache, positions=empty)
    return dataclasses.replace(state, cache=cache, rope_lengths=settings.rope_lengths(state.lengths) + 0)


def must_restart(config: Phi3Config, state: DecodeState, settings: Settings) -> jax.Array:
    """Whether a row has become too long for the LongRoPE factors that its keys were made with: bool scalar."""
    if config.long_rope is None:
        return jnp.asarray(False)
    border = config.long_rope.original_max_position_embeddings
    return (~state.done & (state.rope_lengths <= border) & (settings.rope_lengths(state.lengths) > border)).any()


def hooks_of(edits: tuple[Edit, ...]) -> Hooks | None:
    """What the model is given to make these changes; None, which leaves no trace in a program, for none."""
    return Hooks(edits=edits) if edits else None

"""The compiled functions: `read` is the prefill, chunk by chunk; `decode` writes the answers in a loop on the device.

    begin -> read, read, ... -> answer -> decode, decode, ...   (back to read where LongRoPE's border is crossed)

One turn of the loop is `_forward` (the newest token through the model) and `_accept` (the next token). With a drafter
(speculation.py) the newest token is followed by guesses: `_forward` runs them all at once, and `_accept` keeps those
that would have been picked anyway.

Axis letters: B batch, T prompt chunk, J the newest token and the guesses after it, S cache slot, M tokens of prompt and
answer together, D model, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache, Params, Phi3

from ..sampling import SamplingArrays
from ..sampling.grammar import unpack
from ..sampling.logprobs import LogprobRecord
from ..sampling.pick import pick_places
from .failures import NOT_FINITE, failures, is_finite
from .news import has_watched, news, no_news

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
      watched: uint8 [V], of `sampling.watched_tokens`: `decode` returns after a token that may complete a stop string.
    """

    limits: jax.Array
    end_ids: jax.Array
    sampling: SamplingArrays
    prompt_lengths: jax.Array
    rope_policy: RopePolicy = dataclasses.field(default="length", metadata={"static": True})
    watched: jax.Array | None = None

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


class Drafter(Protocol):
    """Guesses the next tokens of each row; a pytree. See speculation.py.

    Attributes:
      always_guesses: False if there may be turns without a guess; then `propose` must be cheap, and change nothing.
    """

    always_guesses: ClassVar[bool]

    def propose(self, params: Params, state: DecodeState, settings: Settings) -> tuple[Drafter, jax.Array]:
        """-> (the updated drafter, guessed next tokens int32 [B, J - 1]; -1 after the last guess of a row).

        params are its weights; they are not part of the drafter, because it is donated.
        """


_Loop = tuple[jax.Array, DecodeState, Any]  # turns taken, state, drafter


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


@functools.partial(jax.jit, static_argnames=("config", "size", "echo"), donate_argnames=("state", "last"))
def read(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    last: jax.Array,
    begin: jax.Array,
    size: int,
    echo: bool = False,
) -> tuple[DecodeState, jax.Array]:
    """Reads `size` tokens of every row, from place `begin` (int32 scalar) on, into the cache -> (state, last).

    Args:
      last: [B, D], the model's output at the last token of the rows whose last token has been read; others are unset.
      echo: record the log-probabilities of these tokens' successors, which takes B x T x V floats of memory.
    """
    places = begin + jnp.arange(size)
    positions = jnp.where(places < state.lengths[:, None], places, -1)
    tokens = jnp.take(state.tokens, places, axis=1, mode="clip")
    model, variables = Phi3(config), {"params": params}
    result: Any = model.apply(
        variables, tokens, positions, cache=state.cache, rope_lengths=state.rope_lengths[:, None], method="hidden"
    )
    x, cache, _ = result
    record, failed = state.logprobs, state.failed
    if echo and record is not None:
        logits: Any = model.apply(variables, x, method="unembed")
        failed = jnp.where((~is_finite(logits) & (positions >= 0)).any(axis=1), NOT_FINITE, failed)
        beyond = state.tokens.shape[1]
        successors = jnp.take(state.tokens, places + 1, axis=1, mode="clip")
        record = record.write(logits, successors, jnp.where(places + 1 < state.lengths[:, None], places + 1, beyond))
    # Only the last token's output is wanted; a whole prompt's logits would take T x V floats.
    is_last = positions == state.lengths[:, None] - 1
    at_last = jnp.take_along_axis(x, is_last.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    last = jnp.where(is_last.any(axis=1)[:, None], at_last, last)
    done = state.done | (failed > 0)
    told = news(state.tokens, state.lengths, state.lengths, done, failed, jnp.asarray(False))
    return dataclasses.replace(state, cache=cache, done=done, failed=failed, logprobs=record, news=told), last


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def answer(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    last: jax.Array,
    settings: Settings,
    allowed: jax.Array | None = None,
) -> DecodeState:
    """Takes the next token of each row, from `last` [B, D] of `read` or `step`.

    Args:
      allowed: uint32 [B, V / 32 rounded up], a bit for each token that may be taken (`grammar.unpack`); None for all.
    """
    before = state.lengths
    state = _accept(config, params, state, last[:, None], _no_guesses(state), settings, allowed)
    return _tell(config, before, state, settings)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def step(config: Phi3Config, params: Params, state: DecodeState) -> tuple[DecodeState, jax.Array]:
    """Runs the newest token of each row through the model -> (state, last [B, D]): half a turn of `decode`.

    `answer` is the other half. For grammars, where the host acts between the two, and for beam search.
    """
    state, x = _forward(config, params, state, _no_guesses(state))
    return state, x[:, 0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state", "drafter"))
def decode(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    settings: Settings,
    steps: jax.Array,
    drafter: Drafter | None = None,
    draft_params: Params | None = None,
) -> tuple[DecodeState, Any]:
    """Takes up to `steps` (int32 scalar) turns, until all rows are done or one must be restarted.

    Every turn adds a token to each row, or with a drafter at least one. After a turn that may have completed a
    stop string (`settings.watched`) no other is taken. Returns the state and the drafter.
    """

    def propose(loop: _Loop) -> tuple[Any, jax.Array]:
        _, state, drafter = loop
        return (None, _no_guesses(state)) if drafter is None else drafter.propose(draft_params or {}, state, settings)

    def more(loop: _Loop) -> jax.Array:
        count, state, _ = loop
        return (count < steps) & ~state.done.all() & ~must_restart(config, state, settings)

    def has_guesses(loop: _Loop) -> jax.Array:
        return ((propose(loop)[1] >= 0) & ~loop[1].done[:, None]).any()

    def turn(loop: _Loop, guesses: jax.Array) -> _Loop:
        count, old, drafter = loop
        state, x = _forward(config, params, old, guesses)
        state = _accept(config, params, state, x, guesses, settings)
        if settings.watched is not None:
            is_last = has_watched(state.tokens, old.lengths, state.lengths, x.shape[1], settings.watched)
            count = jnp.where(is_last, steps, count)
        return count + 1, state, drafter

    def guessed_turn(loop: _Loop) -> _Loop:
        drafter, guesses = propose(loop)
        return turn((loop[0], loop[1], drafter), guesses)

    def turns(loop: _Loop) -> _Loop:
        # Places for guesses cost time even if there are no guesses. Two loops, because `lax.cond` copies the cache.
        loop = jax.lax.while_loop(
            lambda loop: more(loop) & ~has_guesses(loop), lambda loop: turn(loop, _no_guesses(loop[1])), loop
        )
        return jax.lax.while_loop(lambda loop: more(loop) & has_guesses(loop), guessed_turn, loop)

    one_kind, before = drafter is None or drafter.always_guesses, state.lengths
    _, state, drafter = jax.lax.while_loop(more, guessed_turn if one_kind else turns, (jnp.int32(0), state, drafter))
    return _tell(config, before, state, settings), drafter


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def unroll(config: Phi3Config, params: Params, state: DecodeState, settings: Settings, steps: int) -> DecodeState:
    """Takes exactly `steps` turns: `decode` as a scan, for `jax.grad` and `jax.vmap`.

    Rows that are done stay as they are. Gradients flow through the log-probabilities (`begin(..., logprobs=0)`), not
    through the choice of tokens. Differentiate `read` and `answer` along with it: the cache depends on the weights.

    Raises:
      ValueError: the model has LongRoPE and the policy may ask for a restart, which a scan cannot do.
    """
    if config.long_rope is not None and settings.rope_policy != "capacity":
        raise ValueError(
            f"unroll cannot restart at LongRoPE's border: rope_policy={settings.rope_policy!r}, not 'capacity'"
        )

    def turn(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        none = _no_guesses(state)
        # Gradients through an indexed stack of layers would cost O(L^2).
        state, x = _forward(config, params, state, none, walk="slice")
        return _accept(config, params, state, x, none, settings), None

    return jax.lax.scan(turn, state, None, length=steps)[0]


def must_restart(config: Phi3Config, state: DecodeState, settings: Settings) -> jax.Array:
    """Whether a row has become too long for the LongRoPE factors that its keys were made with: bool scalar."""
    if config.long_rope is None:
        return jnp.asarray(False)
    border = config.long_rope.original_max_position_embeddings
    return (~state.done & (state.rope_lengths <= border) & (settings.rope_lengths(state.lengths) > border)).any()


def _tell(config: Phi3Config, before: jax.Array, state: DecodeState, settings: Settings) -> DecodeState:
    """The state with the news of a call before which rows had lengths `before`."""
    restart = must_restart(config, state, settings)
    return dataclasses.replace(state, news=news(state.tokens, before, state.lengths, state.done, state.failed, restart))


def _no_guesses(state: DecodeState) -> jax.Array:
    return jnp.zeros((len(state.tokens), 0), jnp.int32)


def _forward(
    config: Phi3Config, params: Params, state: DecodeState, guesses: jax.Array, walk: Any = None
) -> tuple[DecodeState, jax.Array]:
    """Runs each row's newest token and the guesses after it -> (state, output [B, J, D])."""
    newest = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
    tokens = jnp.concatenate([newest, jnp.maximum(guesses, 0)], axis=1)
    # A row that is done runs along with the others; position -1 keeps its token out of the cache.
    is_real = jnp.pad(guesses >= 0, ((0, 0), (1, 0)), constant_values=True) & ~state.done[:, None]
    positions = jnp.where(is_real, state.lengths[:, None] - 1 + jnp.arange(tokens.shape[1]), -1)
    result: Any = Phi3(config, walk).apply(
        {"params": params},
        tokens,
        positions,
        cache=state.cache,
        rope_lengths=state.rope_lengths[:, None],
        method="hidden",
    )
    x, cache, _ = result
    return dataclasses.replace(state, cache=cache), x


def _accept(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    x: jax.Array,
    guesses: jax.Array,
    settings: Settings,
    allowed: jax.Array | None = None,
) -> DecodeState:
    """Adds to each row its guesses up to the first that differs from what `pick` picks there, and then that pick.

    A random draw depends only on the row's seed and the token's place in the answer, so the tokens are the same as
    without guesses. A row that comes to a place where nothing can be picked gets no token there: it has failed.

    Args:
      x: [B, J, D], the model's output at the newest token and the guesses after it.
      guesses: int32 [B, J - 1].
    """
    (rows, J), room = x.shape[:2], state.tokens.shape[1]
    logits: Any = Phi3(config).apply({"params": params}, x, method="unembed")
    places = state.lengths[:, None] + jnp.arange(J)  # of the J predicted tokens
    row = jnp.arange(rows)[:, None]
    tokens = state.tokens.at[row, jnp.where(guesses >= 0, places[:, :-1], room)].set(guesses, mode="drop")
    permitted = logits
    if allowed is not None:
        permitted = jnp.where(unpack(allowed, logits.shape[-1])[:, None], logits, -jnp.inf)
    picks = pick_places(permitted, settings.sampling, tokens, places, settings.prompt_lengths, settings.end_ids)
    flags = failures(logits, picks, None if allowed is None else permitted)

    taken = jnp.cumprod(picks[:, :-1] == guesses, axis=1).sum(axis=1)
    count = jnp.minimum(taken + 1, settings.prompt_lengths + settings.limits - state.lengths)
    if config.long_rope is not None:
        # Predictions from a token beyond the border need the long factors.
        border = config.long_rope.original_max_position_embeddings
        count = jnp.where(state.rope_lengths <= border, jnp.minimum(count, border - state.lengths + 1), count)
    is_end = (picks[:, :, None] == settings.end_ids).any(axis=-1)
    first_end = jnp.where(is_end.any(axis=1), is_end.argmax(axis=1), J)
    count = jnp.where(state.done, 0, jnp.minimum(count, first_end + 1))
    first_failure = jnp.where((flags > 0).any(axis=1), (flags > 0).argmax(axis=1), J)
    has_failed = first_failure < count
    count = jnp.minimum(count, first_failure)

    # Tokens that are not added get a place past the end, where the scatter drops them.
    places = jnp.where(jnp.arange(J) < count[:, None], places, room)
    lengths = state.lengths + count
    cache = state.cache
    if J > 1:
        # Forget the keys of guesses that were not taken; the newest token has no keys yet.
        cache = dataclasses.replace(
            cache, positions=jnp.where(cache.positions < lengths[:, None] - 1, cache.positions, -1)
        )
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=state.tokens.at[row, places].set(picks, mode="drop"),
        lengths=lengths,
        done=state.done | has_failed | (first_end < count) | (lengths - settings.prompt_lengths >= settings.limits),
        offered=state.offered + jnp.where(state.done, 0, (guesses >= 0).sum(axis=1)),
        taken=state.taken + jnp.minimum(taken, count),
        failed=jnp.where(has_failed, flags[row[:, 0], jnp.minimum(first_failure, J - 1)], state.failed),
        logprobs=None if state.logprobs is None else state.logprobs.write(logits, picks, places),
    )

"""The compiled functions: `read` is the prefill, chunk by chunk; `decode` writes the answers in a loop on the device.

    begin -> read, read, ... -> answer -> decode, decode, ...   (back to read where LongRoPE's border is crossed)

One turn of the loop is `forward` (the newest token through the model) and `accept` (the next token). With a drafter
(speculation.py) the newest token is followed by guesses: `forward` runs them all at once, and `accept` keeps those that
would have been picked anyway. state.py has what the functions are given and return.

Axis letters: B batch, T prompt chunk, J the newest token and the guesses after it, M tokens of prompt and answer
together, D model, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.model import Params, Phi3
from phi3_jax.model.points import NO_TAP, Edit, Hooks, Tap

from ..sampling.pick import pick_places
from .failures import NOT_FINITE, failures, is_finite
from .news import has_watched, news
from .state import DecodeState as DecodeState
from .state import Settings as Settings
from .state import begin as begin
from .state import hooks_of
from .state import must_restart as must_restart
from .state import restart as restart

Seen = dict[str, jax.Array]


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


@functools.partial(jax.jit, static_argnames=("config", "size", "echo"), donate_argnames=("state", "last"))
def read(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    last: jax.Array,
    begin: jax.Array,
    size: int,
    echo: bool = False,
    edits: tuple[Edit, ...] = (),
) -> tuple[DecodeState, jax.Array]:
    """Reads `size` tokens of every row, from place `begin` (int32 scalar) on, into the cache -> (state, last).

    Args:
      last: [B, D], the model's output at the last token of the rows whose last token has been read; others are unset.
      echo: record the log-probabilities of these tokens' successors, which takes B x T x V floats of memory.
      edits: see `Settings`.
    """
    return read_chunk(config, params, state, last, begin, size, echo, hooks_of(edits))[:2]


def read_chunk(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    last: jax.Array,
    begin: jax.Array,
    size: int,
    echo: bool,
    hooks: Hooks | None,
) -> tuple[DecodeState, jax.Array, Seen]:
    """`read`, not compiled -> (state, last, what `hooks` reads)."""
    places = begin + jnp.arange(size)
    positions = jnp.where(places < state.lengths[:, None], places, -1)
    tokens = jnp.take(state.tokens, places, axis=1, mode="clip")
    x, cache, seen = _hidden(Phi3(config), params, state, tokens, positions, hooks)
    record, failed = state.logprobs, state.failed
    if echo and record is not None:
        logits: Any = Phi3(config).apply({"params": params}, x, method="unembed")
        logits = Tap(hooks, config, positions, {})("logits", logits)
        failed = jnp.where((~is_finite(logits) & (positions >= 0)).any(axis=1), NOT_FINITE, failed)
        beyond = state.tokens.shape[1]
        successors = jnp.take(state.tokens, places + 1, axis=1, mode="clip")
        of_prompt = places + 1 < state.lengths[:, None]
        record = record.write(logits, successors, jnp.where(of_prompt, places + 1, beyond), beyond)
    # Only the last token's output is wanted; a whole prompt's logits would take T x V floats.
    is_last = positions == state.lengths[:, None] - 1
    at_last = jnp.take_along_axis(x, is_last.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    last = jnp.where(is_last.any(axis=1)[:, None], at_last, last)
    done = state.done | (failed > 0)
    told = news(state.tokens, state.lengths, state.lengths, done, failed, jnp.asarray(False))
    return dataclasses.replace(state, cache=cache, done=done, failed=failed, logprobs=record, news=told), last, seen


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
    before, hooks = state.lengths, hooks_of(settings.edits)
    state, _ = accept(config, params, state, last[:, None], no_guesses(state), settings, allowed, hooks)
    return tell(config, before, state, settings)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def step(
    config: Phi3Config, params: Params, state: DecodeState, edits: tuple[Edit, ...] = ()
) -> tuple[DecodeState, jax.Array]:
    """Runs the newest token of each row through the model -> (state, last [B, D]): half a turn of `decode`.

    `answer` is the other half. For grammars, where the host acts between the two, and for beam search.
    """
    state, x, _ = forward(config, params, state, no_guesses(state), hooks_of(edits))
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
        return (None, no_guesses(state)) if drafter is None else drafter.propose(draft_params or {}, state, settings)

    def more(loop: _Loop) -> jax.Array:
        count, state, _ = loop
        return (count < steps) & ~state.done.all() & ~must_restart(config, state, settings)

    def has_guesses(loop: _Loop) -> jax.Array:
        return ((propose(loop)[1] >= 0) & ~loop[1].done[:, None]).any()

    def turn(loop: _Loop, guesses: jax.Array) -> _Loop:
        count, old, drafter = loop
        state, x, _ = forward(config, params, old, guesses, hooks)
        state, _ = accept(config, params, state, x, guesses, settings, hooks=hooks)
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
            lambda loop: more(loop) & ~has_guesses(loop), lambda loop: turn(loop, no_guesses(loop[1])), loop
        )
        return jax.lax.while_loop(lambda loop: more(loop) & has_guesses(loop), guessed_turn, loop)

    one_kind, before, hooks = drafter is None or drafter.always_guesses, state.lengths, hooks_of(settings.edits)
    _, state, drafter = jax.lax.while_loop(more, guessed_turn if one_kind else turns, (jnp.int32(0), state, drafter))
    return tell(config, before, state, settings), drafter


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

    hooks = hooks_of(settings.edits)

    def turn(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        none = no_guesses(state)
        # Gradients through an indexed stack of layers would cost O(L^2).
        state, x = forward(config, params, state, none, hooks, walk="slice")[:2]
        return accept(config, params, state, x, none, settings, hooks=hooks)[0], None

    return jax.lax.scan(turn, state, None, length=steps)[0]


def tell(config: Phi3Config, before: jax.Array, state: DecodeState, settings: Settings) -> DecodeState:
    """The state with the news of a call before which rows had lengths `before`."""
    restart = must_restart(config, state, settings)
    return dataclasses.replace(state, news=news(state.tokens, before, state.lengths, state.done, state.failed, restart))


def no_guesses(state: DecodeState) -> jax.Array:
    """For the newest token alone: int32 [B, 0]."""
    return jnp.zeros((len(state.tokens), 0), jnp.int32)


def forward(
    config: Phi3Config, params: Params, state: DecodeState, guesses: jax.Array, hooks: Hooks | None, walk: Any = None
) -> tuple[DecodeState, jax.Array, Seen]:
    """Runs each row's newest token and the guesses after it -> (state, output [B, J, D], what `hooks` reads)."""
    newest = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
    tokens = jnp.concatenate([newest, jnp.maximum(guesses, 0)], axis=1)
    # A row that is done runs along with the others; position -1 keeps its token out of the cache.
    is_real = jnp.pad(guesses >= 0, ((0, 0), (1, 0)), constant_values=True) & ~state.done[:, None]
    positions = jnp.where(is_real, state.lengths[:, None] - 1 + jnp.arange(tokens.shape[1]), -1)
    x, cache, seen = _hidden(Phi3(config, walk), params, state, tokens, positions, hooks)
    return dataclasses.replace(state, cache=cache), x, seen


def _hidden(
    model: Phi3, params: Params, state: DecodeState, tokens: jax.Array, positions: jax.Array, hooks: Hooks | None
) -> Any:
    """`Phi3.hidden` of tokens [B, T] behind those of the state's cache."""
    options: Any = {"cache": state.cache, "rope_lengths": state.rope_lengths[:, None], "hooks": hooks}
    return model.apply({"params": params}, tokens, positions, **options, method="hidden")


def accept(
    config: Phi3Config,
    params: Params,
    state: DecodeState,
    x: jax.Array,
    guesses: jax.Array,
    settings: Settings,
    allowed: jax.Array | None = None,
    hooks: Hooks | None = None,
) -> tuple[DecodeState, Seen]:
    """Adds to each row its guesses up to the first that differs from what `pick` picks there, and then that pick.

    A random draw depends only on the row's seed and the token's place in the answer, so the tokens are the same as
    without guesses. A row that comes to a place where nothing can be picked gets no token there: it has failed.
    Returns the state, and the logits [B, J, V] if `hooks` reads them.

    Args:
      x: [B, J, D], the model's output at the newest token and the guesses after it.
      guesses: int32 [B, J - 1].
    """
    (rows, J), room = x.shape[:2], state.tokens.shape[1]
    logits: Any = Phi3(config).apply({"params": params}, x, method="unembed")
    places = state.lengths[:, None] + jnp.arange(J)  # of the J predicted tokens
    at = NO_TAP if hooks is None else Tap(hooks, config, places - 1, {})
    logits = at("logits", logits)
    row = jnp.arange(rows)[:, None]
    tokens = state.tokens.at[row, jnp.where(guesses >= 0, places[:, :-1], room)].set(guesses, mode="drop")
    sampling = settings.sampling if allowed is None else settings.sampling.by_grammar(allowed)
    picks = pick_places(logits, sampling, tokens, places, settings.prompt_lengths, settings.end_ids)
    flags = failures(logits, picks, sampling.allowed)

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
    state = dataclasses.replace(
        state,
        cache=cache,
        tokens=state.tokens.at[row, places].set(picks, mode="drop"),
        lengths=lengths,
        done=state.done | has_failed | (first_end < count) | (lengths - settings.prompt_lengths >= settings.limits),
        offered=state.offered + jnp.where(state.done, 0, (guesses >= 0).sum(axis=1)),
        taken=state.taken + jnp.minimum(taken, count),
        failed=jnp.where(has_failed, flags[row[:, 0], jnp.minimum(first_failure, J - 1)], state.failed),
        logprobs=None if state.logprobs is None else state.logprobs.write(logits, picks, places, room),
    )
    return state, at.kept

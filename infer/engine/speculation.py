"""Speculative decoding: guess the next few tokens cheaply, run them through the model at once, keep the right ones.

Most of a step's time goes into reading the weights, so five tokens at once take hardly longer than one. decoding.py
keeps a guess only if it is the token that would have been picked in its place, greedily or with the row's own random
numbers. So the tokens of an answer, and their distribution, are the same with any drafter; only the time changes. (A
draft model draws with the same random numbers as the model. Both then agree nearly as often as two distributions can:
at least (1 - d)/(1 + d) of the time at total variation distance d, "Coupling without Communication and
Drafter-Invariant Speculative Decoding", Daliri et al. 2024.)

`PromptLookup` and `DraftModel` are options of a run; from them `Run` makes the drafter that the compiled loop carries.

Axis letters: B batch, M tokens of prompt and answer together, J - 1 guesses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache, Params, Phi3

from ..sampling.pick import pick
from .decoding import DecodeState, Settings

# They run through the model at once, as a chunk of a prompt does; more than some dozens are hardly ever right.
MOST_GUESSES = 256


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Finds an earlier occurrence of the text's last tokens, and guesses that the same tokens follow again.

    Good for answers that copy from the prompt: edits, summaries, code. Raises ValueError for impossible numbers.

    Attributes:
      guesses: how many tokens are guessed at a time, MOST_GUESSES at most.
      longest: at most this many of the last tokens are compared, MOST_GUESSES at most. The longest match wins; of equal
        ones, the latest.
      shortest: a match with fewer tokens than this gives no guess.
    """

    guesses: int = 8
    longest: int = 8
    shortest: int = 2

    def __post_init__(self) -> None:
        _check_guesses(self.guesses)
        if not 1 <= self.shortest <= self.longest <= MOST_GUESSES:
            raise ValueError(f"{self}: must have 1 <= shortest <= longest <= {MOST_GUESSES}")


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Lets a smaller model with the same vocabulary write the guesses. Raises ValueError for impossible numbers.

    Attributes:
      checkpoint: the smaller model.
      guesses: how many tokens are guessed at a time, MOST_GUESSES at most.
    """

    checkpoint: Checkpoint
    guesses: int = 4

    def __post_init__(self) -> None:
        _check_guesses(self.guesses)


def _check_guesses(guesses: int) -> None:
    if not 1 <= guesses <= MOST_GUESSES:
        raise ValueError(f"guesses={guesses} must be at least 1 and at most {MOST_GUESSES}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupDrafter:
    """The drafter of `PromptLookup`; it has no state."""

    always_guesses: ClassVar[bool] = False
    lookup: PromptLookup = dataclasses.field(metadata={"static": True})

    def propose(self, params: Params, state: DecodeState, settings: Settings) -> tuple[LookupDrafter, jax.Array]:
        """See `decoding.Drafter`."""
        return self, look_up(state.tokens, state.lengths, self.lookup)


def look_up(tokens: jax.Array, lengths: jax.Array, lookup: PromptLookup) -> jax.Array:
    """The guesses of a prompt lookup: int32 [B, guesses], -1 where there is none.

    Args:
      tokens: int32 [B, M], of which the first `lengths` (int32 [B]) of a row are real.
    """
    places = jnp.arange(tokens.shape[1])
    before = places < lengths[:, None] - 1  # an earlier occurrence has a next token
    equal, same = jnp.zeros_like(tokens), jnp.ones_like(tokens, bool)
    for back in range(lookup.longest):
        newest = jnp.take_along_axis(tokens, jnp.maximum(lengths[:, None] - 1 - back, 0), axis=1)
        shifted = jnp.roll(tokens, back, axis=1)
        same &= (shifted == newest) & (places >= back) & (back < lengths[:, None])
        equal += same
    score = jnp.where(before & (equal >= lookup.shortest), equal * tokens.shape[1] + places, -1)
    best = score.argmax(axis=1)[:, None]
    # If the tokens after the match reach the end of the text, it is periodic there: they are repeated.
    period = jnp.maximum(lengths[:, None] - 1 - best, 1)
    guesses = jnp.take_along_axis(tokens, best + 1 + jnp.arange(lookup.guesses) % period, axis=1)
    return jnp.where(jnp.take_along_axis(score, best, axis=1) >= 0, guesses, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """The drafter of `DraftModel`.

    Attributes:
      cache: its keys and values of every token of each row, except perhaps the newest two.
      rope_lengths: int32 [B]: the numbers of tokens that decide LongRoPE's factors. They never change: guesses need not
        be exact, so a restart is not worth its time.
    """

    always_guesses: ClassVar[bool] = True
    config: Phi3Config = dataclasses.field(metadata={"static": True})
    guesses: int = dataclasses.field(metadata={"static": True})
    cache: KVCache
    rope_lengths: jax.Array

    def propose(self, params: Params, state: DecodeState, settings: Settings) -> tuple[ModelDrafter, jax.Array]:
        """See `decoding.Drafter`."""
        newest = state.lengths[:, None] - 1
        # Some of the last guesses may not have been taken; if all were, this model has not run the last one yet.
        positions = self.cache.positions
        cache = dataclasses.replace(self.cache, positions=jnp.where(positions < newest - 1, positions, -1))
        places = newest + jnp.asarray([-1, 0])
        fed = jnp.take_along_axis(state.tokens, jnp.maximum(places, 0), axis=1)
        tokens, row = state.tokens, jnp.arange(len(state.tokens))
        for i in range(self.guesses):
            positions = jnp.where(state.done[:, None], -1, places)
            logits, cache = self._run(params, fed, positions, cache)
            lengths = state.lengths + i
            guess = pick(logits, settings.sampling, tokens, lengths, settings.prompt_lengths, settings.end_ids)
            # Where there is no token to pick, any guess will do: what is written is the model's, never the guess.
            guess = jnp.maximum(guess, 0)
            tokens = tokens.at[row, lengths].set(guess, mode="drop")
            fed, places = guess[:, None], lengths[:, None]
        guesses = jnp.take_along_axis(tokens, state.lengths[:, None] + jnp.arange(self.guesses), axis=1)
        return dataclasses.replace(self, cache=cache), guesses

    def _run(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        model, variables = Phi3(self.config), {"params": params}
        rope_lengths = self.rope_lengths[:, None]
        result: Any = model.apply(variables, tokens, positions, cache=cache, rope_lengths=rope_lengths, method="hidden")
        x, cache, _ = result
        logits: Any = model.apply(variables, x[:, -1], method="unembed")
        return logits, cache

"""The log-probabilities of tokens, which the compiled loop records beside the tokens.

Axis letters: B batch, T tokens of one call, R places of a record, N the most likely tokens, V vocab.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from .pick import top_logprobs


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token of a prompt or an answer.

    The numbers are the log-softmax of the model's own logits, before temperature, penalties and bans, as in OpenAI's
    API.

    Attributes:
      token_id: the token.
      logprob: its log-probability; None for a prompt's first token, which nothing predicts.
      top: the most likely tokens in its place -> their log-probabilities, falling.
    """

    token_id: int
    logprob: float | None
    top: dict[int, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogprobRecord:
    """Log-probabilities of a batch's tokens. That of the token at place p is recorded at p mod R, over an older one.

    Attributes:
      chosen: float32 [B, R]; NaN where nothing was recorded.
      top_ids, top: int32 and float32 [B, R, N].
      wanted: bool scalar: whether any are, for a program that serves both; None: they are.
    """

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array
    wanted: jax.Array | None = None

    @classmethod
    def create(cls, batch: int, length: int, n: int) -> LogprobRecord:
        """An empty record of `length` places for the n most likely tokens."""
        shape = (batch, length, n)
        return cls(
            jnp.full((batch, length), jnp.nan, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        )

    def write(self, logits: jax.Array, tokens: jax.Array, places: jax.Array, end: int) -> LogprobRecord:
        """Adds tokens int32 [B, T] that logits float32 [B, T, V] predicted; a place of `end` or more is skipped."""

        def look() -> tuple[jax.Array, jax.Array, jax.Array]:
            return top_logprobs(logits, tokens, self.top.shape[-1])

        def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(look))

        chosen, ids, values = look() if self.wanted is None else jax.lax.cond(self.wanted, look, nothing)
        length = self.chosen.shape[1]
        rows, slots = jnp.arange(tokens.shape[0])[:, None], jnp.where(places < end, places % length, length)
        return dataclasses.replace(
            self,
            chosen=self.chosen.at[rows, slots].set(chosen, mode="drop"),
            top_ids=self.top_ids.at[rows, slots].set(ids, mode="drop"),
            top=self.top.at[rows, slots].set(values, mode="drop"),
        )

    def read(self, row: int, tokens: list[int], begin: int) -> list[TokenLogprob]:
        """What is recorded of a row's tokens from place `begin` on, up to the first that has no number.

        The text's first token, which nothing predicts, is there without one.
        """
        places = (begin + np.arange(len(tokens))) % self.chosen.shape[1]
        # Indexing the device's arrays would compile a program for each place.
        chosen, ids, values = (np.asarray(part)[row, places].tolist() for part in (self.chosen, self.top_ids, self.top))
        entries = []
        for place, (token, value, *top) in enumerate(zip(tokens, chosen, ids, values, strict=True), start=begin):
            if place > 0 and not math.isfinite(value):
                break
            is_first = place == 0
            entries.append(
                TokenLogprob(token, None if is_first else value, {} if is_first else dict(zip(*top, strict=True)))
            )
        return entries

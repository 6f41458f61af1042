"""Why a row of a batch cannot go on: found in the compiled functions, a flag for each row, and told by the host.

Axis letters: B batch, J places of one turn, V vocab, W words of a grammar's mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The flags, `DecodeState.failed`; 0 is none of them.
NOT_FINITE = 1  # the model's logits are NaN or infinite
NO_TOKEN = 2  # no token may be taken
AGAINST_GRAMMAR = 3  # a token is forced that the grammar does not allow

NOT_FINITE_ADVICE = (
    "the weights may be damaged (download or convert them again), or numbers overflowed: float16 overflows where "
    "float32 and bfloat16 do not"
)


def is_finite(logits: jax.Array) -> jax.Array:
    """Whether all logits [..., V] of a place are numbers: bool [...]."""
    # The maximum of NaN and anything is NaN; XLA's CPU compiler makes one fast loop of it.
    return jnp.isfinite(jnp.abs(logits).max(axis=-1))


def failures(logits: jax.Array, picks: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """The flag of every place, int32 [B, J].

    Args:
      logits: float32 [B, J, V], the model's own.
      picks: int32 [B, J], of `pick`.
      allowed: uint32 [B, W], of `SamplingArrays`.
    """
    found = jnp.where(picks < 0, NO_TOKEN, 0)
    if allowed is not None:
        word = jnp.take_along_axis(allowed, jnp.maximum(picks, 0) >> 5, axis=1)
        fits = word >> (picks & 31).astype(jnp.uint32) & 1
        found = jnp.where((picks >= 0) & (fits == 0), AGAINST_GRAMMAR, found)
    return jnp.where(is_finite(logits), found, NOT_FINITE).astype(jnp.int32)


def explain(flag: int, count: int) -> str:
    """The reason in words, of an answer that has `count` tokens so far."""
    if flag == NOT_FINITE:
        return f"the model's logits for token {count + 1} of the answer are not finite numbers: {NOT_FINITE_ADVICE}"
    if flag == AGAINST_GRAMMAR:
        return f"forced_tokens[{count}] is a token that the grammar does not allow there: change one of the two"
    return (
        f"there is no token to pick as number {count + 1} of the answer: banned_tokens, no_repeat_ngram_size, "
        "min_new_tokens and the grammar together forbid all of them"
    )

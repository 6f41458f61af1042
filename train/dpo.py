"""Direct preference optimisation: makes a chosen answer more likely than a rejected one (arXiv:2305.18290).

Axis letters: B pairs, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .data import Batch, Pair


def interleave(pair: Pair) -> Batch:
    """One batch [2 B, T] of both: chosen, rejected, chosen, ... so that a pair stays on one device."""
    return jax.tree.map(
        lambda chosen, rejected: jnp.stack([chosen, rejected], axis=1).reshape(-1, chosen.shape[-1]),
        pair.chosen,
        pair.rejected,
    )


def preference_sums(
    log_probs: jax.Array, reference: jax.Array, weights: jax.Array, beta: float
) -> dict[str, jax.Array]:
    """The loss of pairs: -log sigmoid(margin), where margin = reward of the chosen answer - reward of the rejected one.

    The reward of an answer is beta * log(p / p of the reference model).

    Args:
      log_probs: float32 [2 B] of whole answers, in the order of `interleave`.
      reference: the same of the model that training started from.
      weights: float32 [2 B]: the sum of weights of each answer; pairs in which nothing is learned do not count.

    Returns:
      float32 sums over the pairs: "loss"; "weight", their number; "correct", the number of those whose chosen answer
      has the higher reward; "margin", of the rewards' differences; "tokens", of the weights.
    """
    rewards = beta * (log_probs - reference).reshape(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    counts = (weights.reshape(-1, 2).sum(axis=1) > 0).astype(jnp.float32)
    return {
        "loss": -(counts * jax.nn.log_sigmoid(margin)).sum(),
        "weight": counts.sum(),
        "correct": (counts * (margin > 0)).sum(),
        "margin": (counts * margin).sum(),
        "tokens": weights.sum(),
    }

"""From logits to the next token.

Axis letters: B batch, V vocab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """Picks one token per row.

    Args:
      logits: float32 [B, V].
      keys: one random key per row, [B].
      temperature: float32 scalar; 0 takes the most likely token, larger values draw from softmax(logits / temperature).

    Returns:
      int32 [B].
    """

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return jax.lax.cond(temperature > 0, draw, greedy).astype(jnp.int32)

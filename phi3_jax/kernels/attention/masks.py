"""The attention mask, computed from positions and segments alone.

Axis letters: B batch, T query, S key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_mask(
    q_positions: jax.Array,
    k_positions: jax.Array,
    window: int | None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
) -> jax.Array:
    """True where a query may attend to a key: not padding, not in the future, within its window and its segment.

    One rule serves training, prefill, decoding and packed sequences, because it depends on positions, not on slots.

    Args:
      q_positions: int32 [B, T].
      k_positions: int32 [B, S]; -1 for an empty slot.
      window: how many keys a query sees, itself included; None means all.
      q_segments, k_segments: int32 [B, T] and [B, S], or None where a row is one sequence.

    Returns:
      bool [B, T, S].
    """
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    visible = (k >= 0) & (k <= q)
    if window is not None:
        visible &= k > q - window
    if q_segments is not None and k_segments is not None:
        visible &= q_segments[:, :, None] == k_segments[:, None, :]
    return visible


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """bool [B, T], True for tokens, False for padding on either side -> positions int32 [B, T], -1 for padding."""
    return jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, -1)


def sequence_lengths(positions: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """The length of each token's sequence, by which LongRoPE chooses its factors.

    Args:
      positions: int32 [B, T], -1 for padding.
      segments: int32 [B, T] with ids in [0, T), or None where a row is one sequence.

    Returns:
      int32 [B, 1] or, with segments, [B, T].
    """
    if segments is None:
        return positions.max(axis=-1, keepdims=True) + 1

    def of_row(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_max(row, ids, num_segments=row.shape[0])[ids] + 1

    return jax.vmap(of_row)(positions, segments)

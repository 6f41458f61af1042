"""The arguments of attention besides the queries.

Axis letters: L layer, B batch, T query, S key, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax

from phi3_jax.kernels.attention.masks import attention_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys and values of one layer, or of all of them.

    Attributes:
      k, v: [B, K, S, H], or [L, B, K, S, H] indexed by `layer`; H may be larger than the queries', padded with zeros.
      k_scale, v_scale: float32 [(L,) B, K, S] where k and v are int8, else None.
      layer: int32 scalar, or None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    layer: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys each query may see (masks.py).

    Attributes:
      q_positions: int32 [B, T], -1 for padding.
      k_positions: int32 [B, S], -1 for an empty slot.
      q_segments, k_segments: int32 [B, T] and [B, S], or None where a row is one sequence.
      window: how many keys a query sees, itself included; None means all.
      in_order: a promise about the arrays, which kernels need when a program is compiled: the keys are the queries'
        own tokens in their order; in a row, sequences lie side by side from slot 0 on, each with positions 0, 1, 2,
        ... and, where there are several, with a segment of its own; and padding comes after them.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self) -> jax.Array:
        """bool [B, T, S], True where a query may attend to a key."""
        return attention_mask(self.q_positions, self.k_positions, self.window, self.q_segments, self.k_segments)

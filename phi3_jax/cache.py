"""The key-value cache: what the attention layers remember of the tokens before.

Axis letters: L layer, B batch, T new token, S slot, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer. The token at position p of a row lies in slot p of that row.

    Attributes:
      k, v: [L, B, K, S, H]; one head's keys lie together, so that a query reads them in one sweep.
      positions: int32 [B, S]: the position of the token in each slot, -1 where there is none.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array

    @classmethod
    def create(cls, config: Phi3Config, batch: int, capacity: int, dtype: jnp.dtype | type = jnp.float32) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens each."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        empty = jnp.full((batch, capacity), -1, jnp.int32)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), positions=empty)

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.positions.shape[-1]

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: the number of tokens of each row so far, which is also the position of its next token."""
        return self.positions.max(axis=-1) + 1

    def claim(self, positions: jax.Array) -> KVCache:
        """Marks the slots of new tokens as taken; positions is int32 [B, T], -1 for padding, which takes none."""
        rows, slots = self._slots(positions)
        return dataclasses.replace(self, positions=self.positions.at[rows, slots].set(positions, mode="drop"))

    def write(self, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        """Stores one layer's new keys and values, each [B, T, K, H], in the slots of their positions."""
        rows, slots = self._slots(positions)
        where = (layer, rows, slice(None), slots)
        return dataclasses.replace(
            self,
            k=self.k.at[where].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[where].set(v.astype(self.v.dtype), mode="drop"),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values, each [B, K, S, H]."""
        return self.k[layer], self.v[layer]

    def _slots(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.arange(positions.shape[0])[:, None]
        # A slot past the end is dropped by the scatter: that is how padding is skipped.
        return rows, jnp.where(positions >= 0, positions, self.capacity)

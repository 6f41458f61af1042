"""Weights as small integers: groups of neighbouring inputs share a scale, and perhaps an offset.

How the integers are found is in phi3_jax/quantization/.

Axis letters: L layer, O outputs, I inputs, J inputs rounded up to whole groups, A = J / group groups.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

GROUPS = (32, 64, 128)  # how many inputs may share a scale
ZERO = {8: 128, 4: 8}  # the integer that means 0 where there is no offset
SMALLEST, LARGEST = {8: 1, 4: 0}, {8: 255, 4: 15}  # the range of the integers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [O, I], or a stack [L, O, I], of integers q: weight = (q - ZERO[bits]) * scale, or q * scale + min.

    Attributes:
      values: uint8 [..., O, J] (8 bits, 1 to 255) or [..., O, J / 2] (4 bits, 0 to 15: the lower half of byte i is
        input 2 i, the upper half 2 i + 1). Inputs beyond I are padding.
      scales: float16 [..., O, A].
      mins: float16 [..., O, A], or None where q is symmetric around its zero.
      bits: 8 or 4.
      columns: I.
      compute: the name of the dtype in which a model computes whose embedding this is.
    """

    values: jax.Array
    scales: jax.Array
    mins: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    compute: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for: [..., O, I]."""
        return (*self.values.shape[:-1], self.columns)

    @property
    def dtype(self) -> Any:
        """The dtype that a model with such an embedding computes in."""
        return jnp.dtype(self.compute)

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.values.shape[-1] * (8 // self.bits) // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def layer(self, index: jax.Array) -> QuantizedTensor:
        """One layer of a stack."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` (int [...]) as floats [..., I] of `dtype`; an id out of range gives NaN."""
        there = (ids >= 0) & (ids < self.values.shape[0])
        taken = jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0, mode="clip"), self)
        return jnp.where(there[..., None], taken.dequantize(self.dtype), jnp.nan)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The weight as floats [..., O, I], computed in float32."""
        values = self.values
        if self.bits == 4:
            values = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
        q = values.reshape(*self.scales.shape, self.group).astype(jnp.float32)
        scales = self.scales[..., None].astype(jnp.float32)
        if self.mins is None:
            floats = (q - ZERO[self.bits]) * scales
        else:
            floats = q * scales + self.mins[..., None].astype(jnp.float32)
        return floats.reshape(*values.shape)[..., : self.columns].astype(dtype)

"""Weights as small integers: groups of neighbouring inputs share a scale, and perhaps an offset.

How the integers are found is in phi3_jax/quantization/.

Axis letters: L layer, O outputs, I inputs, J inputs rounded up to whole groups, A = J / group groups.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

GROUPS = (32, 64, 128)  # how many inputs may share a scale
ZERO = {8: 128, 4: 8}  # the integer that means 0 where there is no offset
_LANES = 128  # of a TPU's vectors
SMALLEST, LARGEST = {8: 1, 4: 0}, {8: 255, 4: 15}  # the range of the integers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [O, I], or a stack [L, O, I], of integers q: weight = (q - ZERO[bits]) * scale, or q * scale + min.

    The arrays lie by rows, as in a file, or by columns, which `by_columns` makes of them: outputs are then adjacent in
    memory, and fill the lanes of a TPU's vectors, whose compiler would otherwise lay a whole stack out anew in each
    call. The integers are the same ones.

    Attributes:
      values: uint8 [..., O, J] (8 bits, 1 to 255) or [..., O, J / 2] (4 bits, 0 to 15: the lower half of byte i is
        input 2 i, the upper half 2 i + 1). Inputs beyond I are padding.
      scales: float16 [..., O, A].
      mins: float16 [..., O, A], or None where q is symmetric around its zero.
      bits: 8 or 4.
      columns: I.
      compute: the name of the dtype in which a model computes whose embedding this is.
      outputs: None by rows. By columns O: values are then q - ZERO[bits] as int8 or int4 [..., J, P], scales and mins
        [..., A, P], where P is O rounded up to a multiple of 128 with zeros. As a TPU has no float16, uint16 holds
        their bits.
    """

    values: jax.Array
    scales: jax.Array
    mins: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    compute: str = dataclasses.field(default="float32", metadata={"static": True})
    outputs: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def by_column(self) -> bool:
        """Whether the arrays lie by columns."""
        return self.outputs is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for: [..., O, I]."""
        return (*self.values.shape[:-2], self.outputs or self.scales.shape[-2], self.columns)

    @property
    def dtype(self) -> Any:
        """The dtype that a model with such an embedding computes in."""
        return jnp.dtype(self.compute)

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        if self.by_column:
            return self.values.shape[-2] // self.scales.shape[-2]
        return self.values.shape[-1] * (8 // self.bits) // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        values = self.values.size * self.bits // 8 if self.by_column else self.values.nbytes
        return values + self.scales.nbytes + (0 if self.mins is None else self.mins.nbytes)

    def layer(self, index: jax.Array) -> QuantizedTensor:
        """One layer of a stack."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` (int [...]) as floats [..., I] of `dtype`; an id out of range gives NaN."""
        there = (ids >= 0) & (ids < self.shape[-2])
        flat = jnp.where(there, ids, 0).reshape(-1)
        taken = jax.tree.map(lambda leaf: jnp.take(leaf, flat, axis=-1 if self.by_column else -2), self)
        if self.by_column:
            taken = dataclasses.replace(taken, outputs=len(flat))
        floats = taken.dequantize(self.dtype).reshape(*ids.shape, self.columns)
        return jnp.where(there[..., None], floats, jnp.nan)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The weight as floats [..., O, I], computed in float32."""
        rows = self.by_rows() if self.by_column else self
        values = _unpacked(rows.values, self.bits, jnp)
        q = values.reshape(*rows.scales.shape, self.group).astype(jnp.float32)
        scales = rows.scales[..., None].astype(jnp.float32)
        if rows.mins is None:
            floats = (q - ZERO[self.bits]) * scales
        else:
            floats = q * scales + rows.mins[..., None].astype(jnp.float32)
        return floats.reshape(*values.shape)[..., : self.columns].astype(dtype)

    def by_columns(self) -> QuantizedTensor:
        """The same weight by columns; NumPy arrays are converted on the host, one layer after another."""
        if self.by_column:
            return self
        padding = [(0, 0), (0, -self.shape[-2] % _LANES)]

        def turned(x: Any) -> Any:
            xp = np if isinstance(x, np.ndarray) else jnp
            return xp.pad(xp.swapaxes(x, -1, -2), [(0, 0)] * (x.ndim - 2) + padding)

        def signed(values: Any) -> Any:
            if not isinstance(values, np.ndarray):
                wide = _unpacked(values, self.bits, jnp).astype(jnp.int32) - ZERO[self.bits]
                return turned(wide).astype(jnp.int8 if self.bits == 8 else jnp.int4)
            bytes_ = (_unpacked(values, self.bits, np) - np.uint8(ZERO[self.bits])).view(np.int8)
            return turned(bytes_).view(np.int8 if self.bits == 8 else ml_dtypes.int4)  # on the host, a byte, too

        if isinstance(self.values, np.ndarray) and self.values.ndim == 3:
            first = signed(self.values[0])
            values = np.empty((len(self.values), *first.shape), first.dtype)
            for i, layer in enumerate(self.values):
                values[i] = first if i == 0 else signed(layer)
        else:
            values = signed(self.values)
        scales, mins = turned(self.scales.view(np.uint16)), self.mins
        mins = None if mins is None else turned(mins.view(np.uint16))
        return dataclasses.replace(self, values=values, scales=scales, mins=mins, outputs=self.shape[-2])

    def by_rows(self) -> QuantizedTensor:
        """The same weight by rows; NumPy arrays stay on the host."""
        if self.outputs is None:
            return self

        def turned(x: Any) -> Any:
            return x.swapaxes(-1, -2)[..., : self.outputs, :]

        values = turned((self.values.astype(np.int32) + ZERO[self.bits]).astype(np.uint8))
        if self.bits == 4:
            values = values[..., ::2] | values[..., 1::2] << 4
        scales, mins = turned(self.scales.view(np.float16)), self.mins
        mins = None if mins is None else turned(mins.view(np.float16))
        return dataclasses.replace(self, values=values, scales=scales, mins=mins, outputs=None)


def _unpacked(values: Any, bits: int, xp: Any) -> Any:
    """uint8 [..., J] of values by rows, one integer in each byte."""
    if bits == 8:
        return values
    return xp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)

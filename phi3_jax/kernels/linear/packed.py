"""Weights in the order in which the CPU kernels read them: in panels, whose outputs fill the lanes of a vector.

Axis letters: L layer, O outputs, I inputs, P panels of 64 (bfloat16) or 32 outputs, J inputs rounded up to whole
groups, A = J / group groups. The layouts are drawn in native/linear/linear.h.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from phi3_jax.kernels.linear.quantized import ZERO, QuantizedTensor
from phi3_jax.kernels.native.build import library

Kind = Literal["bfloat16", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
_LANES = {"bfloat16": 64, "int8": 32, "int4": 32}
_ALIGNMENT = 64  # bytes: such a buffer becomes a JAX array on the CPU without another copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A stack of weights [L, O, I] (or one weight [O, I], stored as L = 1) in the kernels' layout.

    Attributes:
      data: bfloat16 [L, P, I / 2 rounded up, 128]; uint8 [L, P, J / 4, 128] (int8) or [L, P, J / 8, 128] (int4).
      scales: float16 [L, P, A, 32]; None for bfloat16.
      mins: float16 [L, P, A, 32]; None where the integers are symmetric around their zero (quantized.py).
      kind: "bfloat16", "int8" or "int4".
      shape: the shape of the weights that this stands for.
    """

    data: jax.Array
    scales: jax.Array | None
    mins: jax.Array | None
    kind: Kind = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """The dtype that a model with such weights computes in."""
        return jnp.dtype(jnp.float32)

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        if self.scales is None:
            raise ValueError("bfloat16 weights have no groups")
        return self.data.shape[2] * (32 // BITS[self.kind]) // self.scales.shape[2]

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self, layer: jax.Array | None = None) -> jax.Array:
        """One layer's weight, or the only one, as float32 [O, I]; unpacked by XLA."""
        index = jnp.int32(0) if layer is None else layer
        scales, mins = (None if leaf is None else leaf[index] for leaf in (self.scales, self.mins))
        floats = _unpack(self.kind, self.data[index], scales, mins)  # [P, lanes, J]
        return floats.reshape(-1, floats.shape[-1])[: self.shape[-2], : self.shape[-1]]

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` (int [...]) of a single weight, as float32 [..., I]; an id out of range gives NaN."""
        lanes, there = _LANES[self.kind], (ids >= 0) & (ids < self.shape[-2])
        safe = jnp.where(there, ids, 0)
        panel, lane = safe // lanes, safe % lanes
        data = self.data[0].reshape(*self.data.shape[1:3], lanes, 128 // lanes)[panel, :, lane]
        scales, mins = (None if x is None else x[0][panel, :, lane][..., None] for x in (self.scales, self.mins))
        return jnp.where(there[..., None], _unpack(self.kind, data, scales, mins)[..., 0, : self.shape[-1]], jnp.nan)


def has_packed(params: Any) -> bool:
    """Whether a parameter tree has packed weights, also where an adapter is attached to them."""

    def is_one(leaf: Any) -> bool:
        return isinstance(leaf, PackedTensor)

    return any(map(is_one, jax.tree.leaves(params, is_leaf=is_one)))


def pack(params: Any) -> Any:
    """A parameter tree with its matrices packed: floats as bfloat16, integers as they are; norms become float32.

    Raises Unavailable if the CPU kernels cannot be used here. `phi3_jax.load` can pack a checkpoint while it is read,
    which takes less memory.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, PackedTensor):
            return leaf
        stacked = jax.tree_util.keystr(path, simple=True, separator="/").startswith("layers/")
        if isinstance(leaf, QuantizedTensor):
            leaf = leaf.by_rows()
            packing = Packing(leaf.shape, "int8" if leaf.bits == 8 else "int4", leaf.group, leaf.mins is None)
            arrays = [None if each is None else np.asarray(each) for each in (leaf.values, leaf.scales, leaf.mins)]
            for i in range(leaf.shape[0] if stacked else 1):
                values, scales, mins = (each[i] if stacked and each is not None else each for each in arrays)
                packing.put_integers(i, np.asarray(values), np.asarray(scales), mins)
            return packing.finish()
        if leaf.ndim - stacked < 2:
            return leaf.astype(jnp.float32)
        packing, floats = Packing(leaf.shape, "bfloat16"), np.asarray(leaf)
        for i in range(len(floats) if stacked else 1):
            packing.put_floats(i, floats[i] if stacked else floats)
        return packing.finish()

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


class Packing:
    """Builds a PackedTensor, one matrix after another, from any number of threads."""

    def __init__(self, shape: tuple[int, ...], kind: Kind, group: int = 32, symmetric: bool = True) -> None:
        """Allocates memory for weights of this shape. Raises Unavailable if the CPU kernels cannot be used here."""
        self.shape, self.kind, self.group, self._library = shape, kind, group, library()
        arrays = {name: aligned_empty(*each) for name, each in arrays_of(shape, kind, group, symmetric).items()}
        self.data, self.scales, self.mins = arrays["data"], arrays.get("scales"), arrays.get("mins")

    def put_floats(self, layer: int, weight: np.ndarray) -> None:
        """Packs a matrix [O, I] of floats as bfloat16."""
        pack = self._library.phi3_pack_bf16
        if weight.dtype != ml_dtypes.bfloat16:
            weight, pack = weight.astype(np.float32, copy=False), self._library.phi3_pack_f32_as_bf16
        panels = map(ctypes.c_int64, (0, self.data.shape[1]))
        _call(pack, np.ascontiguousarray(weight), *map(ctypes.c_int64, weight.shape), *panels, self.data[layer])

    def put_integers(self, layer: int, values: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
        """Packs a matrix of integers, given as the arrays of a QuantizedTensor of this kind and group.

        Raises ValueError if mins are given for symmetric integers, or are missing for others.
        """
        if (mins is None) != (self.mins is None):
            raise ValueError("symmetric and asymmetric integers do not go into one packed tensor")
        rows, columns = self.shape[-2], scales.shape[-1] * self.group
        sizes = (*map(ctypes.c_int64, (rows, columns, self.group)), ctypes.c_int(BITS[self.kind]))
        sizes = (*sizes, *map(ctypes.c_int64, (0, self.data.shape[1])))
        assert self.scales is not None  # integers always have scales
        ours = (self.data[layer], self.scales[layer], None if self.mins is None else self.mins[layer])
        _call(self._library.phi3_pack_quantized, *map(_contiguous, (values, scales, mins)), *sizes, *ours)

    def finish(self, to_device: Callable[[np.ndarray], jax.Array] = jax.device_put) -> PackedTensor:
        """The finished tensor; nothing may be put into it any more."""
        leaves = [None if leaf is None else to_device(leaf) for leaf in (self.data, self.scales, self.mins)]
        return PackedTensor(jax.block_until_ready(leaves)[0], leaves[1], leaves[2], self.kind, self.shape)


def arrays_of(
    shape: tuple[int, ...], kind: Kind, group: int, symmetric: bool
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of a PackedTensor's arrays by name; group and symmetric are ignored for bfloat16."""
    layers, (outputs, inputs) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    panels = -(-outputs // _LANES[kind])
    if kind == "bfloat16":
        return {"data": ((layers, panels, -(-inputs // 2), 128), np.dtype(ml_dtypes.bfloat16))}
    groups = -(-inputs // group)
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "data": ((layers, panels, groups * group * BITS[kind] // 32, 128), np.dtype(np.uint8)),
        "scales": ((layers, panels, groups, 32), np.dtype(np.float16)),
    }
    return found if symmetric else found | {"mins": found["scales"]}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that JAX uses it on the CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _contiguous(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array)


def _call(function: Any, *arguments: Any) -> None:
    """Calls a C function, with arrays as pointers (None as the null pointer); its result must be 0."""
    converted = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
    if code := function(*converted):
        raise ValueError(f"{function.__name__} refused its arguments (code {code})")


def _unpack(kind: Kind, data: jax.Array, scales: jax.Array | None, mins: jax.Array | None) -> jax.Array:
    """[..., steps, lanes * values of a lane in a step], scales [..., A, lanes] -> float32 [..., lanes, J]."""
    data = data.reshape(*data.shape[:-1], -1, 2 if kind == "bfloat16" else 4)
    if kind == "int4":
        data = jnp.concatenate([data & 15, data >> 4], axis=-1)
    data = jnp.swapaxes(data, -3, -2)
    data = data.reshape(*data.shape[:-2], -1)
    if kind == "bfloat16" or scales is None:
        return data.astype(jnp.float32)

    def spread(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, -2, -1)[..., None].astype(jnp.float32)  # [..., lanes, A, 1]

    q = data.reshape(*spread(scales).shape[:-1], -1).astype(jnp.float32)
    zero = ZERO[BITS[kind]]
    floats = (q - zero) * spread(scales) if mins is None else q * spread(scales) + spread(mins)
    return floats.reshape(*data.shape)

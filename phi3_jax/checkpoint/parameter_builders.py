"""Builders of parameters, which read them layer by layer: as floats, as integers, or packed for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from phi3_jax.checkpoint.gguf.blocks import IntegerRows, with_mins
from phi3_jax.checkpoint.placement import Put
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.kernels import PerLayer, QuantizedTensor
from phi3_jax.kernels.linear.packed import Packing, aligned_empty
from phi3_jax.quantization import Format, quantize


class ParameterBuilder(Protocol):
    """One parameter, stacked over layers: a call of `put` for each layer, in any order and from several threads."""

    def put(self, layer: int | None, source: TensorSource) -> None:
        """Reads a tensor into its place; layer is None where the parameter is not a stack.

        Raises ValueError if values cannot be converted.
        """

    def finish(self) -> Any:
        """The finished parameter, its arrays on their devices; nothing may be put into it any more."""


class LayersBuilder:
    """A buffer for each layer, which leaves the host before the next one is read."""

    def __init__(self, layers: int, builder: Callable[[], ParameterBuilder]) -> None:
        """`builder` makes a builder of one layer's weight."""
        self._layers: list[Any] = [None] * layers
        self._builder = builder

    def put(self, layer: int | None, source: TensorSource) -> None:
        """See `ParameterBuilder`."""
        assert layer is not None  # only stacks have layers
        one = self._builder()
        one.put(None, source)
        self._layers[layer] = jax.block_until_ready(one.finish())

    def finish(self) -> PerLayer:
        """See `ParameterBuilder`."""
        return PerLayer(tuple(self._layers))


class FloatBuilder:
    """An array of floats."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, to_device: Put = jax.device_put) -> None:
        """Allocates memory for a parameter of this shape."""
        self._array: np.ndarray | None = aligned_empty(shape, dtype)
        self._to_device = to_device

    def put(self, layer: int | None, source: TensorSource) -> None:
        """See `ParameterBuilder`."""
        assert self._array is not None  # `finish` comes last
        slot = self._array if layer is None else self._array[layer]
        tensor = source.read()
        if tensor.dtype == slot.dtype:
            # As raw integers: numpy copies those at memory speed, but extension dtypes element by element.
            raw = np.dtype(f"u{slot.dtype.itemsize}")
            np.copyto(slot.view(raw), tensor.view(raw))
            return
        with np.errstate(over="ignore"):
            np.copyto(slot, tensor, casting="unsafe")
        if slot.dtype == np.float16 and not np.isfinite(slot).all() and np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError("there are values beyond float16's largest, 65504: load it as bfloat16 or float32")

    def finish(self) -> jax.Array:
        """See `ParameterBuilder`."""
        array, self._array = self._array, None
        assert array is not None  # nothing is finished twice
        return self._to_device(array)


class PackedFloatBuilder:
    """bfloat16 for the kernels."""

    def __init__(self, shape: tuple[int, ...], to_device: Put = jax.device_put) -> None:
        """Allocates memory for a parameter of this shape."""
        self._packing, self._to_device = Packing(shape, "bfloat16"), to_device

    def put(self, layer: int | None, source: TensorSource) -> None:
        """See `ParameterBuilder`."""
        self._packing.put_floats(layer or 0, source.read())

    def finish(self) -> Any:
        """See `ParameterBuilder`."""
        return self._packing.finish(self._to_device)


class IntegerBuilder:
    """Integers in groups, packed for the kernels or not."""

    def __init__(
        self,
        shape: tuple[int, ...],
        form: Format,
        packed: bool,
        to_device: Put = jax.device_put,
        compute: str = "float32",
        by_column: bool = False,
    ) -> None:
        """Allocates memory for a parameter of this shape; `compute` and `by_column` are QuantizedTensor's."""
        self._form, self._shape, self._to_device, self._compute = form, shape, to_device, compute
        self._by_column = by_column
        self._packing = (
            Packing(shape, "int8" if form.bits == 8 else "int4", form.group, form.symmetric) if packed else None
        )
        if packed:
            return
        *outputs, inputs = shape
        groups = -(-inputs // form.group)
        values = aligned_empty((*outputs, groups * form.group * form.bits // 8), np.dtype(np.uint8))
        scales, mins = (aligned_empty((*outputs, groups), np.dtype(np.float16)) for _ in range(2))
        self._arrays: Any = values, scales, None if form.symmetric else mins

    def put(self, layer: int | None, source: TensorSource) -> None:
        """See `ParameterBuilder`."""
        rows = self._stored(source)
        if rows is None:
            tensor = quantize(source.read(), self._form)
            mins = None if tensor.mins is None else np.asarray(tensor.mins)
            rows = IntegerRows(np.asarray(tensor.values), np.asarray(tensor.scales), mins, tensor.bits)
        if self._packing is not None:
            self._packing.put_integers(layer or 0, rows.values, rows.scales, rows.mins)
            return
        for ours, theirs in zip(self._arrays, rows[:3], strict=True):
            if ours is not None and theirs is not None:
                (ours if layer is None else ours[layer])[...] = theirs

    def finish(self) -> Any:
        """See `ParameterBuilder`."""
        if self._packing is not None:
            return self._packing.finish(self._to_device)
        values, scales, mins = self._arrays
        tensor = QuantizedTensor(values, scales, mins, self._form.bits, self._shape[-1], self._compute)
        del self._arrays, values, scales, mins
        return jax.tree.map(self._to_device, tensor.by_columns() if self._by_column else tensor)

    def _stored(self, source: TensorSource) -> IntegerRows | None:
        """The file's own integers if they have the wanted format, else None."""
        theirs = source.form
        if theirs is None or source.quantized is None or (theirs.bits, 32) != (self._form.bits, self._form.group):
            return None
        if theirs.has_mins and self._form.symmetric:
            return None
        rows = source.quantized()
        return rows if rows is None or self._form.symmetric else with_mins(rows)

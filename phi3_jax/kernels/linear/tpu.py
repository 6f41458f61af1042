"""The TPU kernel: products with integers by columns, which are read from memory once, for any number of rows.

XLA alone computes them without temporaries up to some 64 rows, but on its vector units: by its own estimate a product
with int8 takes three times as long as one with bfloat16. Beyond that it writes the floats of every matrix to memory.

Axis letters: M rows of x, J inputs rounded up to whole groups, A = J / group groups, O outputs, P those with padding.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phi3_jax.kernels.linear import xla
from phi3_jax.kernels.linear.quantized import ZERO, QuantizedTensor

_LANES = 128
_WEIGHTS = 2**21  # of a block of weights: below some 2**18 bytes, turns of the grid cost more than what they read
_ROWS_BYTES = 2**22  # of a block of x
_STEP = 1024  # inputs whose weights become floats at a time
_VMEM = 64 * 2**20


def linear(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any = None, interpret: Any = False) -> jax.Array:
    """See `kernels.linear`; the integers are by columns, and `interpret` is pallas_call's, for tests elsewhere."""
    if not isinstance(weight, QuantizedTensor) or not weight.by_column:
        raise ValueError("the TPU kernel multiplies integers by columns only: load them with layout='columns'")
    J, O = weight.values.shape[-2], weight.shape[-2]  # noqa: E741
    rows = x.reshape(-1, x.shape[-1])
    rows = jnp.pad(rows, [(0, 0), (0, J - x.shape[-1])])
    leaves = (weight.values, weight.scales, weight.mins)
    stacks = [each if each is None or layer is not None else each[None] for each in leaves]
    if not interpret:  # else XLA brings whole stacks into a large fast memory, again for each layer (scales, on a v6e)
        stacks = [each if each is None else pltpu.with_memory_space_constraint(each, pltpu.HBM) for each in stacks]
    index = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    M, block, outputs = len(rows), *_block_sizes(rows, weight)

    of_x = pl.BlockSpec((block, J), lambda column, row, layer: (row, 0))
    of_out = pl.BlockSpec((block, outputs), lambda column, row, layer: (row, column))
    of_stack = [
        None
        if each is None
        else pl.BlockSpec((1, each.shape[1], outputs), lambda column, row, layer: (layer[0], 0, column))
        for each in stacks
    ]
    call = pl.pallas_call(
        functools.partial(_kernel, zero=ZERO[weight.bits]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-O // outputs), -(-M // block)),
            in_specs=[of_x, of_stack],
            out_specs=of_out,
            scratch_shapes=[pltpu.VMEM((J, outputs), x.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((M, O), dtype or x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name="linear",
    )
    out: jax.Array = call(index, rows, stacks)
    return out.reshape(*x.shape[:-1], O)


def one_row(x: jax.Array, weight: jax.Array, layer: jax.Array | None, dtype: Any = None) -> jax.Array:
    """See `kernels.linear`; x is a single row, [..., in], and the weight floats.

    XLA would compute it on the vector units. With a second row it is a product of matrices, which by XLA's own estimate
    takes two fifths of the time on a v5e, a third on a v6e.
    """
    rows = jnp.pad(x.reshape(1, -1), [(0, 1), (0, 0)])
    return xla.linear(rows, weight, layer, dtype)[:1].reshape(*x.shape[:-1], -1)


def _block_sizes(rows: Any, weight: QuantizedTensor) -> tuple[int, int]:
    """How many rows of x, and how many outputs, a turn of the grid takes: all inputs of them."""
    (M, J), P = rows.shape, weight.values.shape[-1]
    fitting = _ROWS_BYTES // (J * rows.dtype.itemsize) // _LANES * _LANES
    outputs = _WEIGHTS * 8 // (weight.bits * J) // _LANES * _LANES
    return min(M, max(fitting, _LANES)), min(P, max(outputs, _LANES))


def _kernel(_layer: Any, x: Any, weight: list[Any], out: Any, floats: Any, *, zero: int) -> None:
    """A block of rows times a block of weights, which become floats once, before their first block of rows."""
    values, scales, mins = weight
    J, groups = values.shape[1], scales.shape[1]
    group = J // groups
    step = max(_STEP // group, 1)  # in groups

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for first in range(0, groups, step):
            some = slice(first, min(first + step, groups))
            inputs = slice(some.start * group, some.stop * group)
            q = values[0, inputs].astype(jnp.int32).astype(jnp.float32).reshape(-1, group, values.shape[2])
            scale = _float32(scales[0, some])
            w = q * scale[:, None]
            if mins is not None:
                w = w + (_float32(mins[0, some]) + zero * scale)[:, None]
            floats[inputs] = w.reshape(-1, values.shape[2]).astype(floats.dtype)

    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out[...] = jnp.dot(x[...], floats[...], precision=exact, preferred_element_type=jnp.float32).astype(out.dtype)


def _float32(bits: jax.Array) -> jax.Array:
    """The numbers whose float16 bits these are (uint16): a TPU has no such type, and reads small float32 as zero."""
    wide = bits.astype(jnp.int32)
    magnitude, exponent = wide & 0x7FFF, wide & 0x7C00
    normal = jax.lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * 2.0**-24
    return jnp.where(exponent > 0, normal, small) * jnp.where(wide > 0x7FFF, -1.0, 1.0)

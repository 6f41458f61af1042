"""Matrix products with a model's weights, and rows of them: floats, integers, packed, or with a LoRA adapter."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.linear import cpu, lora, xla
from phi3_jax.kernels.linear.lora import LoraTensor
from phi3_jax.kernels.linear.packed import PackedTensor
from phi3_jax.kernels.linear.per_layer import PerLayer
from phi3_jax.kernels.linear.quantized import QuantizedTensor
from phi3_jax.kernels.native.build import why_unavailable

Implementation = Literal["xla", "cpu"]
Weight = jax.Array | QuantizedTensor | PackedTensor | LoraTensor | PerLayer


def linear(
    x: jax.Array,
    weight: Weight,
    layer: jax.Array | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x @ weight.T: x [..., in], weight [out, in], or a stack [L, out, in] indexed by `layer` -> [..., out].

    Args:
      layer: int32 scalar; of a `PerLayer` a number that is known when the program is traced.
      dtype: of the result; by default x's.
      implementation: "cpu" is the compiled kernels, which need packed weights; "xla" takes all weights, on every
        platform. None takes the kernels where a program is compiled for the CPU and they can be used, else XLA.

    Raises:
      ValueError: `implementation` is "cpu" and the weight is not packed.
      Unavailable: `implementation` is "cpu" and the kernels cannot be used here.
    """
    if isinstance(weight, PerLayer):
        return linear(x, weight[layer], None, dtype, implementation)
    if isinstance(weight, LoraTensor):
        product = functools.partial(linear, weight=weight.base, layer=layer, dtype=dtype, implementation=implementation)
        return lora.linear(x, weight, layer, product)
    if implementation == "cpu":
        return cpu.linear(x, weight, layer, dtype)
    reference = functools.partial(xla.linear, dtype=dtype)
    if implementation == "xla":
        return reference(x, weight, layer)
    on_cpu = isinstance(weight, PackedTensor) and jax.default_backend() == "cpu" and why_unavailable() is None
    by_cpu = functools.partial(cpu.linear, dtype=dtype) if on_cpu else None
    by_column = isinstance(weight, QuantizedTensor) and weight.by_column
    by_tpu = functools.partial(_by_tpu, dtype=dtype) if by_column else None
    return by_platform(reference, cpu=by_cpu, tpu=by_tpu)(x, weight, layer)


def _by_tpu(x: jax.Array, weight: QuantizedTensor, layer: jax.Array | None, dtype: Any) -> jax.Array:
    from phi3_jax.kernels.linear import tpu  # Pallas: the other platforms' programs need not wait for its import

    return tpu.linear(x, weight, layer, dtype)


def rows(table: Weight, ids: jax.Array, fixed: jax.Array | bool = False) -> jax.Array:
    """The rows `ids` (int [...]) of an embedding [V, D] -> [..., D]; an id out of range gives NaN.

    Args:
      fixed: bool, broadcastable to the result: where the row gets no gradient.
    """
    if isinstance(table, LoraTensor):
        return lora.rows(table, ids, fixed, rows(table.base, ids, fixed))
    if isinstance(table, QuantizedTensor | PackedTensor):
        x = table.rows(ids)
    else:
        x = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    return jnp.where(fixed, jax.lax.stop_gradient(x), x)

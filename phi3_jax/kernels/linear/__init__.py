"""Matrix products with a model's weights, and rows of them: floats, integers, packed, or with a LoRA adapter."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.linear import cpu, cuda, lora, xla
from phi3_jax.kernels.linear.lora import LoraRows, LoraTensor
from phi3_jax.kernels.linear.packed import PackedTensor
from phi3_jax.kernels.linear.per_layer import PerLayer
from phi3_jax.kernels.linear.quantized import QuantizedTensor
from phi3_jax.kernels.native.build import why_unavailable

Implementation = Literal["xla", "cpu", "cuda", "tpu"]
Weight = jax.Array | QuantizedTensor | PackedTensor | LoraTensor | LoraRows


def linear(
    x: jax.Array,
    weight: Weight | PerLayer,
    layer: jax.Array | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x @ weight.T: x [..., in], weight [out, in], or a stack [L, out, in] indexed by `layer` -> [..., out].

    Args:
      layer: int32 scalar; of a `PerLayer` a number that is known when the program is traced.
      dtype: of the result; by default x's.
      implementation: "cpu" is the compiled kernels for it, which need packed weights; "cuda" those for NVIDIA cards,
        which need integers as they are stored; "tpu" that for TPUs, which needs them by columns; "xla" takes all
        weights, on every platform. None takes the kernels of the platform that a program is compiled for, where they
        can be used, else XLA.

    Raises:
      ValueError: `implementation` is "cpu", "cuda" or "tpu", and its kernels do not take this weight.
      Unavailable: `implementation` is "cpu" or "cuda" and its kernels cannot be used here.
    """
    if isinstance(weight, PerLayer):
        return linear(x, weight[layer], None, dtype, implementation)
    if isinstance(weight, LoraTensor | LoraRows):
        product = functools.partial(linear, weight=weight.base, layer=layer, dtype=dtype, implementation=implementation)
        if isinstance(weight, LoraRows):
            return lora.linear_of_rows(x, weight, layer, product, implementation)
        return lora.linear(x, weight, layer, product)
    if implementation == "cpu":
        return cpu.linear(x, weight, layer, dtype)
    if implementation == "cuda":
        return cuda.linear(x, weight, layer, dtype)
    if implementation == "tpu":
        return _by_tpu(x, weight, layer, dtype)
    reference = functools.partial(xla.linear, dtype=dtype)
    if implementation == "xla":
        return reference(x, weight, layer)
    on_cpu = isinstance(weight, PackedTensor) and jax.default_backend() == "cpu" and why_unavailable() is None
    by_cpu = functools.partial(cpu.linear, dtype=dtype) if on_cpu else None
    by_cuda = functools.partial(cuda.linear, dtype=dtype) if cuda.why_not(weight) is None else None
    by_column = isinstance(weight, QuantizedTensor) and weight.by_column
    is_one_row = isinstance(weight, jax.Array) and x.size == x.shape[-1]
    by_tpu = functools.partial(_by_tpu, dtype=dtype) if by_column or is_one_row else None
    return by_platform(reference, cpu=by_cpu, cuda=by_cuda, tpu=by_tpu)(x, weight, layer)


def gated(x: jax.Array, weight: Weight | PerLayer, layer: jax.Array | None = None) -> jax.Array:
    """up * silu(gate) -> [..., F], where gate and up are the halves of x @ weight.T; weight is [2 F, in] or a stack.

    The kernels for NVIDIA cards compute it at once where the weight is integers.
    """
    if isinstance(weight, PerLayer):
        return gated(x, weight[layer])

    def reference(x: jax.Array, weight: Weight, layer: jax.Array | None) -> jax.Array:
        gate, up = jnp.split(linear(x, weight, layer), 2, axis=-1)
        return up * jax.nn.silu(gate)

    by_cuda = functools.partial(cuda.linear, dtype=None, gated=True) if cuda.why_not(weight, True) is None else None
    return by_platform(reference, cuda=by_cuda)(x, weight, layer)


def _by_tpu(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any) -> jax.Array:
    from phi3_jax.kernels.linear import tpu  # Pallas: the other platforms' programs need not wait for its import

    return (tpu.one_row if isinstance(weight, jax.Array) else tpu.linear)(x, weight, layer, dtype)


def rows(table: Weight, ids: jax.Array, fixed: jax.Array | bool = False) -> jax.Array:
    """The rows `ids` (int [...]) of an embedding [V, D] -> [..., D]; an id out of range gives NaN.

    Args:
      fixed: bool, broadcastable to the result: where the row gets no gradient.
    """
    if isinstance(table, LoraTensor):
        return lora.rows(table, ids, fixed, rows(table.base, ids, fixed))
    if isinstance(table, LoraRows):
        return lora.rows_of_rows(table, ids, fixed, rows(table.base, ids, fixed))
    if isinstance(table, QuantizedTensor | PackedTensor):
        x = table.rows(ids)
    else:
        x = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    return jnp.where(fixed, jax.lax.stop_gradient(x), x)

"""The reference: weights become floats, then one einsum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.kernels.linear.packed import PackedTensor
from phi3_jax.kernels.linear.quantized import QuantizedTensor


def linear(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any) -> jax.Array:
    """See `kernels.linear`."""

    def product(x: jax.Array, weight: Any) -> jax.Array:
        floats = dense(weight, layer, x.dtype)
        # Without HIGHEST, accelerators multiply float32 matrices with the precision of bfloat16 or TF32. Products of
        # 16-bit floats are exact in float32 as they are, and it would only take them from the fast units.
        is_wide = jnp.result_type(x, floats).itemsize > 2
        precision = jax.lax.Precision.HIGHEST if is_wide else jax.lax.Precision.DEFAULT
        return jnp.einsum("...i,oi->...o", x, floats, precision=precision, preferred_element_type=dtype)

    if isinstance(weight, QuantizedTensor):
        # The backward pass makes the floats again: those of all layers, kept for it, would take more memory than a
        # model of floats.
        product = jax.checkpoint(product)
    return product(x, weight)


def dense(weight: Any, layer: jax.Array | None, dtype: Any) -> jax.Array:
    """A weight as floats [out, in]: integers and packed weights in this dtype, floats in their own."""
    if isinstance(weight, PackedTensor):
        return weight.dequantize(layer).astype(dtype)
    if isinstance(weight, QuantizedTensor):
        return (weight if layer is None else weight.layer(layer)).dequantize(dtype)
    return weight if layer is None else jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)

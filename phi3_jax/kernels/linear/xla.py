"""The reference: weights become floats, then one einsum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.kernels.packed import PackedTensor
from phi3_jax.quantization import QuantizedTensor


def linear(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any) -> jax.Array:
    """See `kernels.linear`."""
    if isinstance(weight, PackedTensor):
        weight = weight.dequantize(layer).astype(x.dtype)
    elif isinstance(weight, QuantizedTensor):
        weight = (weight if layer is None else weight.layer(layer)).dequantize(x.dtype)
    elif layer is not None:
        weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    # Without HIGHEST, accelerators multiply float32 matrices with the precision of bfloat16 or TF32.
    return jnp.einsum("...i,oi->...o", x, weight, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)

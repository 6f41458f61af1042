"""The CPU kernels: bfloat16 products summed in float32, or integer products of activations rounded to int8 by group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.linear.packed import BITS, PackedTensor
from phi3_jax.kernels.native.build import library


def linear(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any) -> jax.Array:
    """See `kernels.linear`."""
    if not isinstance(weight, PackedTensor):
        raise ValueError("the CPU kernels multiply packed weights only: load them with layout='packed'")
    library()  # raises Unavailable
    index = jnp.int32(0) if layer is None else layer.astype(jnp.int32)
    return _product(x.astype(jnp.float32), weight, index).astype(dtype or x.dtype)


def _call(x: jax.Array, weight: PackedTensor, index: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[-2]), jnp.float32)
    if weight.kind == "bfloat16":
        call = jax.ffi.ffi_call("phi3_linear_bf16", out, vmap_method="sequential")
        return call(x, weight.data, index)
    call = jax.ffi.ffi_call("phi3_linear_quantized", out, vmap_method="sequential")
    mins = jnp.zeros(0, jnp.float16) if weight.mins is None else weight.mins
    return call(x, weight.data, weight.scales, mins, index, bits=np.int64(BITS[weight.kind]))


_product = jax.custom_batching.custom_vmap(_call)


@_product.def_vmap
def _together(size: int, is_batched: Any, x: jax.Array, weight: PackedTensor, index: jax.Array) -> Any:
    """Under `jax.vmap` over x alone, which is more rows: the weights are read once for all of them."""
    if any(jax.tree.leaves(is_batched[1:])):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
        return jax.vmap(_call, axes, axis_size=size)(x, weight, index), True
    return _product(x, weight, index), True

"""The kernels for NVIDIA cards: integers times bfloat16 on tensor cores, scaled and summed in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.cuda.build import library, why_unavailable
from phi3_jax.kernels.linear.quantized import GROUPS, QuantizedTensor


def linear(x: jax.Array, weight: Any, layer: jax.Array | None, dtype: Any, gated: bool = False) -> jax.Array:
    """See `kernels.linear`, and `kernels.linear.gated`; x is rounded to bfloat16.

    A layer of a stack is copied out of it first.
    """
    if not isinstance(weight, QuantizedTensor) or weight.by_column:
        raise ValueError("the kernels for NVIDIA cards multiply integers by rows: load with quantize=, layout='layers'")
    library()  # raises Unavailable
    weight = weight if layer is None else weight.layer(layer)
    out = jnp.dtype(dtype or x.dtype)
    found = jnp.dtype(jnp.bfloat16) if out == jnp.bfloat16 else jnp.dtype(jnp.float32)
    outputs, inputs = weight.shape[-2] // (2 if gated else 1), weight.scales.shape[-1] * weight.group
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.bfloat16)
    if inputs != weight.columns:
        rows = jnp.pad(rows, [(0, 0), (0, inputs - weight.columns)])
    mins = jnp.zeros(0, jnp.float16) if weight.mins is None else weight.mins
    call = jax.ffi.ffi_call(
        "phi3_cuda_linear", jax.ShapeDtypeStruct((len(rows), outputs), found), vmap_method="sequential"
    )
    result = call(rows, weight.values, weight.scales, mins, bits=np.int64(weight.bits), gated=gated)
    return result.reshape(*x.shape[:-1], outputs).astype(out)


def why_not(weight: Any, gated: bool = False) -> str | None:
    """Why the kernels do not multiply with this weight here; None if they do."""
    if jax.default_backend() != "gpu":  # their compilers are not to be started there
        return "this process does not compute on a GPU"
    if not isinstance(weight, QuantizedTensor):
        return "they multiply integers only"
    if weight.by_column:
        return "its integers lie by columns, as a TPU reads them"
    if weight.group not in GROUPS:
        return f"{weight.group} inputs share a scale, not one of {GROUPS}"
    if gated and weight.shape[-2] % 16:
        return f"gate and up have {weight.shape[-2] // 2} rows, not a multiple of 8"
    return why_unavailable()

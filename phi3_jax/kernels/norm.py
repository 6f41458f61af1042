"""RMSNorm (arXiv:1910.07467): in XLA, and by a CPU kernel that gives a row the same bits whatever is beside it.

XLA orders the sum of a row's squares by the shape of the whole array, so that a row's result would change in its last
bits with the number of rows that are computed together.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.linear.per_layer import PerLayer
from phi3_jax.kernels.native.build import library, why_unavailable

Implementation = Literal["xla", "cpu"]
_DTYPES = ("float32", "bfloat16")  # of rows and weights that the kernel takes


def rms_norm(
    x: jax.Array,
    weight: jax.Array | PerLayer,
    eps: float,
    layer: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """weight * x / sqrt(mean(x * x) + eps), computed in float32 and rounded to x's dtype before and after the weight.

    Args:
      x: [..., D].
      weight: [D], or a stack [L, D] that is indexed by `layer`.
      eps: added to the mean of the squares.
      layer: int32 scalar; of a `PerLayer` a number that is known when the program is traced.
      implementation: "cpu" is the compiled kernel for it, "xla" runs everywhere. None takes the kernel in programs for
        the CPU, where it can be used, else XLA. Derivatives are XLA's.

    Raises:
      ValueError: `implementation` is "cpu", and x or weight are neither float32 nor bfloat16.
      Unavailable: `implementation` is "cpu", and the kernels cannot be used here.
    """
    if isinstance(weight, PerLayer):
        return rms_norm(x, weight[layer], eps, None, implementation)
    if implementation == "cpu":
        return _by_cpu(x, weight, layer, eps)
    reference = functools.partial(_by_xla, eps=eps)
    if implementation == "xla" or jax.default_backend() != "cpu":  # elsewhere, their compiler is not to be started
        return reference(x, weight, layer)
    usable = {x.dtype.name, weight.dtype.name} <= {*_DTYPES} and why_unavailable() is None
    return by_platform(reference, cpu=functools.partial(_by_cpu, eps=eps) if usable else None)(x, weight, layer)


def rate(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x * x) + eps) of x [..., D] -> float32 [..., 1], what a row is multiplied with, by XLA."""
    x32 = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + float(eps))


def of_layer(weight: jax.Array | PerLayer, layer: jax.Array | None) -> jax.Array:
    """A layer's own weight [D]."""
    if isinstance(weight, PerLayer):
        return weight[layer]
    return weight if layer is None else jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)


def _by_xla(x: jax.Array, weight: jax.Array, layer: jax.Array | None, eps: float) -> jax.Array:
    normed = (x.astype(jnp.float32) * rate(x, eps)).astype(x.dtype)
    # Weights may be wider than x: beside integers, those of a file stay as they are.
    return (of_layer(weight, layer) * normed).astype(x.dtype)


def _by_cpu(x: jax.Array, weight: jax.Array, layer: jax.Array | None, eps: float) -> jax.Array:
    for name, dtype in (("x", x.dtype.name), ("the weight", weight.dtype.name)):
        if dtype not in _DTYPES:
            raise ValueError(f"the CPU kernel normalises rows of {' or '.join(_DTYPES)}, but {name} is {dtype}")
    library()  # raises Unavailable
    stack = weight[None] if layer is None else weight
    index = jnp.int32(0) if layer is None else layer.astype(jnp.int32)
    return _normed(x, stack, index, jnp.float32(eps))


def _call(x: jax.Array, stack: jax.Array, index: jax.Array, eps: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("phi3_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(x, stack, index, eps)


_normed = jax.custom_batching.custom_vmap(_call)


@_normed.def_vmap
def _together(size: int, is_batched: Any, x: jax.Array, stack: jax.Array, index: jax.Array, eps: jax.Array) -> Any:
    """Under `jax.vmap` over x alone, which is more rows: one call for all of them."""
    if any(is_batched[1:]):
        axes = tuple(0 if batched else None for batched in is_batched)
        return jax.vmap(_call, axes, axis_size=size)(x, stack, index, eps), True
    return _normed(x, stack, index, eps), True

"""What parameters stand for, as floats: integers dequantised, attached adapters added. For files that others read."""

from __future__ import annotations

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.adapters import merged
from phi3_jax.checkpoint.parameter_builders import FloatBuilder
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.kernels import LoraTensor, PerLayer
from phi3_jax.kernels.linear.xla import dense
from phi3_jax.model import DTYPES, Params, dtype_name


def as_floats(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The same model in floats of a dtype that DTYPES names; each weight is summed in float32 and rounded once.

    One layer after another becomes floats: the host holds the parameters, their floats, and one matrix more.

    Raises ValueError if a value does not fit into float16, or the dtype is unknown.
    """
    floats = DTYPES[dtype_name(dtype)]
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict(
        {path: _float(path, leaf, floats) for path, leaf in leaves.items()}, sep="/"
    )


def _float(path: str, leaf: Any, dtype: np.dtype) -> jax.Array:
    builder = FloatBuilder(leaf.shape, dtype)
    shape, layers = (leaf.shape[1:], range(leaf.shape[0])) if path.startswith("layers/") else (leaf.shape, (None,))
    for layer in layers:
        try:
            builder.put(layer, TensorSource(shape, "float32", functools.partial(matrix, leaf, layer)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return builder.finish()


def matrix(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer's weight, or with None the only one, in float32: with the adapter that is attached to it."""
    if isinstance(leaf, PerLayer):
        leaf, layer = leaf[layer], None
    return np.asarray(_matrix(leaf, None if layer is None else jnp.int32(layer)))


@jax.jit
def _matrix(leaf: Any, layer: jax.Array | None) -> jax.Array:
    if not isinstance(leaf, LoraTensor):
        return dense(leaf, layer, jnp.float32).astype(jnp.float32)
    a, b, gain = (None if each is None else dense(each, layer, None) for each in (leaf.a, leaf.b, leaf.gain))
    whole = merged(_matrix(leaf.base, layer), {"a": a, "b": b}, leaf.scaling)
    return whole if gain is None else whole * gain[:, None]

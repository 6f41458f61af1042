"""A weight of all decoder layers in a buffer for each: what a GPU multiplies where it lies.

A stack that is indexed or sliced in a loop is copied there, layer by layer, before each product of more than one row.
With a buffer per layer the loop over layers is unrolled, and each product reads its own.

Axis letters: L layer, O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels.linear.lora import LoraRows, LoraTensor
from phi3_jax.kernels.linear.packed import PackedTensor, has_packed
from phi3_jax.kernels.linear.quantized import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A stack [L, ...] of weights, whose layers are apart.

    Attributes:
      layers: L arrays of one shape and dtype, or as many QuantizedTensors or LoraTensors [O, I].
    """

    layers: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stack that this stands for."""
        return (len(self.layers), *self.layers[0].shape)

    @property
    def ndim(self) -> int:
        """The number of axes of that stack."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """That of each layer."""
        return self.layers[0].dtype

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __getitem__(self, layer: Any) -> Any:
        """One layer's weight. Raises TypeError for an index that is known only when the program runs."""
        if isinstance(layer, jax.core.Tracer) or not isinstance(layer, SupportsIndex):
            raise TypeError("a weight in a buffer per layer is indexed by a number, not by a computed value")
        return self.layers[operator.index(layer)]


def has_per_layer(params: Any) -> bool:
    """Whether a parameter tree has weights in a buffer per layer."""
    return any(isinstance(leaf, PerLayer) for leaf in jax.tree.leaves(params, is_leaf=_is_one))


def split_layers(params: Any) -> Any:
    """A parameter tree of stacks, with the layers of each in buffers of their own.

    Packed weights stay as they are: they are in the order of the CPU kernels, which index a stack.
    """
    layers: dict[str, Any] = params["layers"]
    return params | {"layers": jax.tree.map(_split, layers, is_leaf=_is_weight)}


def stack_layers(params: Any) -> Any:
    """The parameter tree whose `split_layers` this is: plain stacks [L, ...], as training reads them."""
    return jax.tree.map(lambda leaf: stacked(leaf) if _is_one(leaf) else leaf, params, is_leaf=_is_one)


def stacked(weight: PerLayer) -> Any:
    """The stack that a weight stands for; NumPy arrays where the layers are such."""
    return jax.tree.map(_stack, *weight.layers)


def _split(leaf: Any) -> Any:
    if _is_one(leaf) or has_packed(leaf):
        return leaf
    parts, tree = jax.tree.flatten(leaf)
    return PerLayer(tuple(jax.tree.unflatten(tree, [part[i] for part in parts]) for i in range(leaf.shape[0])))


def _stack(*arrays: Any) -> Any:
    return np.stack(arrays) if all(isinstance(each, np.ndarray) for each in arrays) else jnp.stack(arrays)


def _is_one(leaf: Any) -> bool:
    return isinstance(leaf, PerLayer)


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, PerLayer | QuantizedTensor | PackedTensor | LoraTensor | LoraRows)

"""Shardings: one mesh of all devices; the rows of a batch are spread over it, and the weights may be, too.

This file gives only the shardings of arrays; the compiler adds the communication (arXiv:2105.04663). Spreading weights
and optimizer state is known as ZeRO-3 or FSDP (arXiv:1910.02054).
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_AXIS = "devices"


def make_mesh() -> Mesh:
    """A mesh of all devices, with one axis."""
    return jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))


def of_rows(mesh: Mesh, rows: int, axes_before: int = 0) -> NamedSharding:
    """The sharding of a batch by its axis of rows, which has `axes_before` axes before it.

    Raises:
      ValueError: the rows cannot be shared out evenly.
    """
    if rows % mesh.size:
        raise ValueError(f"batch_size={rows}: must be a multiple of the number of devices, {mesh.size}")
    return NamedSharding(mesh, PartitionSpec(*[None] * axes_before, _AXIS))


def of_state(mesh: Mesh, tree: Any, spread: bool) -> Any:
    """The sharding of each leaf of weights or optimizer state: replicated, or with `spread` split along one axis.

    This is the longest axis that the number of devices divides. It depends on a leaf's shape alone, so that a weight,
    its gradient and its moments are sharded alike.
    """

    def of_leaf(leaf: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not spread or not even:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(even, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, _AXIS))

    return jax.tree.map(of_leaf, tree)

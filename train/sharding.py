"""Which device has what: one mesh of all devices; rows of a batch are spread over it, and weights may be, too.

Only the places of arrays are said here; the compiler finds the communication (arXiv:2105.04663). Spread weights, with
their optimizer state, are what is known as ZeRO-3 or FSDP (arXiv:1910.02054).
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_AXIS = "devices"


def make_mesh() -> Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))


def of_rows(mesh: Mesh, rows: int, axes_before: int = 0) -> NamedSharding:
    """Where a batch lies, whose axis of rows has others before it.

    Raises:
      ValueError: the rows cannot be shared out evenly.
    """
    if rows % mesh.size:
        raise ValueError(f"batch_size={rows}: must be a multiple of the number of devices, {mesh.size}")
    return NamedSharding(mesh, PartitionSpec(*[None] * axes_before, _AXIS))


def of_state(mesh: Mesh, tree: Any, spread: bool) -> Any:
    """Where each leaf of weights or optimizer state lies: everywhere, or spread along its longest axis that divides.

    This goes by a leaf's shape alone, so that a weight, its gradient and its moments lie together.
    """

    def of_leaf(leaf: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not spread or not even:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(even, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, _AXIS))

    return jax.tree.map(of_leaf, tree)

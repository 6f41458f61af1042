"""How much memory a step takes, computed before the first step, and whether there is enough.

The numbers are the compiler's own: it has placed every array of the compiled step in memory. Formulas for activations
would have to know what it fuses, computes again and overlaps.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax

_GB = 1e9
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each device while a step runs; on the CPU, of all devices together, because they share one memory.

    Attributes:
      state: what is trained, and the optimizer's state.
      frozen: weights that stay as they are.
      working: gradients, activations and the batch.
      saving: a copy of the state and its compressed form, while a checkpoint is written; only if device and host share
        one memory.
      available: what there is; None if it is not known.
    """

    state: int
    frozen: int
    working: int
    saving: int
    available: int | None

    @property
    def needed(self) -> int:
        """All of it."""
        return self.state + self.frozen + self.working + self.saving

    @property
    def fits(self) -> bool:
        """Whether there is enough, as far as is known."""
        return self.available is None or self.needed <= self.available

    def __str__(self) -> str:
        parts = {"state": self.state, "frozen": self.frozen, "working": self.working, "saving": self.saving}
        told = ", ".join(f"{name} {size / _GB:.2f}" for name, size in parts.items() if size)
        if self.available is None:
            return f"needs {self.needed / _GB:.2f} GB ({told})"
        verdict = "fits" if self.fits else "does not fit"
        return f"needs {self.needed / _GB:.2f} GB ({told}) of {self.available / _GB:.2f}: {verdict}"


def estimate(compiled: jax.stages.Compiled, state: Any, frozen: Any) -> Estimate:
    """The memory of a compiled train step.

    Args:
      compiled: of arguments (state, frozen, batch), the state donated.
      state, frozen: trees of arrays or `jax.ShapeDtypeStruct` with shardings: the step's arguments.
    """
    on_cpu = jax.default_backend() == "cpu"
    devices = jax.device_count() if on_cpu else 1
    stats = compiled.memory_analysis()
    state_bytes, frozen_bytes = (_bytes_of_device(tree) * devices for tree in (state, frozen))
    whole = 0 if stats is None else stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    if stats is not None:  # the new state is written over the old one, which is donated
        whole += stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    working = max(0, whole * devices - state_bytes - frozen_bytes)
    return Estimate(state_bytes, frozen_bytes, working, 2 * state_bytes if on_cpu else 0, available())


def _bytes_of_device(tree: Any) -> int:
    """What one device holds of a tree."""

    def of_leaf(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


def available() -> int | None:
    """The memory of one device, or on the CPU the machine's, as far as this process may use it; None: not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit")
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in map(Path, _CGROUPS):
        text = path.read_text().strip() if path.exists() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits) if limits else None

"""How many kernels the device runs for each token, and which take the time, from a profile."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path
from typing import Any

import jax
import models
import numpy as np

from phi3_jax.infer import Run

_STEPS = 16


def count(report: Any, rehearse: bool) -> None:
    """Adds a line for each form: kernels per token and layer, the device's busy time, and the longest kernels."""
    config = models.config(rehearse)
    for form in models.FORMS[2:] if rehearse else models.FORMS:
        if not report.has_time(f"{form} launches", 30):
            return
        rows = np.random.default_rng(0).integers(5, config.vocab_size, (1, 24 if rehearse else 512)).tolist()
        run = Run(models.checkpoint(config, form), rows, [4 * _STEPS])
        while not any(new.token_ids for new in run.advance(1)):
            pass
        run.advance(_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run.advance(_STEPS)
            kernels = _kernels(Path(folder))
        if not kernels:
            report.add(f"{form} launches", "the profile has no kernels of a device")
            continue
        seconds = collections.Counter[str]()
        for name, taken in kernels:
            seconds[name] += taken
        total = len(kernels) / _STEPS
        found = {"per token": total, "per layer": total / config.num_hidden_layers}
        found |= {"busy, ms per token": sum(seconds.values()) / _STEPS * 1e3}
        longest = {name[:60]: taken / _STEPS * 1e3 for name, taken in seconds.most_common(8)}
        report.add(f"{form} launches", found | {"longest, ms per token": longest})


def _kernels(folder: Path) -> list[tuple[str, float]]:
    """Name and seconds of everything that ran on a device's streams."""
    found = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream") or line.name == "XLA Ops":
                    found += [(event.name, event.duration_ns / 1e9) for event in line.events]
    return found

"""The steps whose metrics are still on the devices; fetching them waits for the steps.

Axis letters: A batches of a step, B rows, T tokens.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.kernels.machine import peak_rate

from ...data import Batch, Pair
from ...settings import Settings, resolved
from ..flops import step_flops
from ..observer import Record


class Window:
    """Collects the steps since the last time that metrics were written."""

    def __init__(self, settings: Settings, config: Phi3Config, rows: float):
        """Begins at the first step; `rows` are those of a pass over the data."""
        self._settings, self._config = settings, config
        s = resolved(settings)
        self._rows, self._each = rows, s.batch_size * s.accumulation  # of a pass, of a step
        self._peak = peak_rate(s.compute_dtype)
        self.restart()

    def restart(self) -> None:
        """Forgets the steps, and starts the clock again, because the time since the last one was for other work."""
        self._steps: list[tuple[int, Any]] = []
        self._tokens, self._flops, self._since = 0, 0.0, time.perf_counter()

    def add(self, step: int, metrics: Any, batch: Batch | Pair) -> None:
        """Adds a step that is being computed on a batch of numpy arrays [A, B, T]."""
        parts = jax.tree.leaves(batch, is_leaf=lambda leaf: isinstance(leaf, Batch))
        self._tokens += sum(int(np.count_nonzero(part.positions >= 0)) for part in parts)
        self._flops += step_flops(self._settings, self._config, batch)
        self._steps.append((step, metrics))

    def records(self) -> list[Record]:
        """Waits for the steps -> the record of each; the speed in it is the mean over all of them."""
        fetched = jax.device_get([metrics for _, metrics in self._steps])
        seconds = time.perf_counter() - self._since
        times = {"seconds": seconds / len(fetched), "tokens_per_second": self._tokens / seconds}
        if self._peak:
            times["mfu"] = self._flops / seconds / self._peak
        records = []
        for (step, _), metrics in zip(self._steps, fetched, strict=True):
            numbers = {name: float(value) for name, value in sorted(metrics.items())}
            passes = {"passes": step * self._each / self._rows}
            records.append({"step": step, **with_perplexity(numbers, self._settings), **passes, **times})
        return records


def with_perplexity(means: Record, settings: Settings) -> Record:
    """Adds "perplexity", if "loss" is a mean over tokens (not for preferences)."""
    if settings.method == "dpo":
        return means
    loss = means["loss"]
    return {**means, "perplexity": math.exp(loss) if loss < 700 else math.inf}

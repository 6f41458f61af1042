"""Where a run's time went; what jax spends on compiling is told by its own events."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_COMPILING = "/jax/core/compile/"  # begins the names of the events of tracing, lowering and compiling


@dataclasses.dataclass
class Timings:
    """Seconds spent by a run, filled in while it goes on: compiling, reading the prompts, writing the answers."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Adds what the `with` block takes to a phase, but what it compiles to `compile`."""
        begin, _thread.spans = time.perf_counter(), []
        try:
            yield
        finally:
            seconds, compiling = time.perf_counter() - begin, _union(_thread.spans)
            _thread.spans = None
            self.compile += compiling
            setattr(self, phase, getattr(self, phase) + seconds - compiling)


class _Thread(threading.local):
    """What this thread compiles inside of `Timings.of`: begins and ends; None outside."""

    spans: list[tuple[float, float]] | None = None


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if _thread.spans is not None and event.startswith(_COMPILING):
        end = time.perf_counter()
        _thread.spans.append((end - duration_secs, end))


def _union(spans: list[tuple[float, float]] | None) -> float:
    """Seconds that are in any of the spans; a function that is traced inside of another has spans in both."""
    total, reached = 0.0, 0.0
    for begin, end in sorted(spans or []):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


_thread = _Thread()
jax.monitoring.register_event_duration_secs_listener(_note)

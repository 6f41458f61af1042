"""What a run tells to whoever watches it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .metrics import Record


class Observer:
    """Told what a run does; a program overrides these to show it."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Something before or between the steps has come so far."""

    def note(self, text: str) -> None:
        """Something to know, in one line."""

    def begin(self, step: int, steps: int) -> None:
        """The steps begin, `step` of them done before. From now on the run asks whether it is interrupted."""

    def record(self, record: Record) -> None:
        """A line of metrics was written."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: steps done, in all.
      exported: the folder of the adapter or the model; None if the run was interrupted, and the same settings go on
        with it.
    """

    step: int
    exported: Path | None

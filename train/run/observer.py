"""What a run reports while it goes on, and at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # a line of metrics.jsonl


class Observer:
    """Is called while a run goes on; a program overrides these methods to show it."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Work before or between the steps has come to `done` of `total`."""

    def note(self, text: str) -> None:
        """A message, in one line."""

    def begin(self, step: int, steps: int) -> None:
        """The steps begin; `step` of them were done before. From now on the run checks whether it is interrupted."""

    def record(self, record: Record) -> None:
        """A line of metrics was written."""

    def table(self, lines: Sequence[str]) -> None:
        """The evaluations before, of the best step and at the end, as lines of a table; none without held-out data."""

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """A sample answer was written: what the model as it is after this step says."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: steps done, in all.
      exported: the folder of the adapter or the model; None if the run was interrupted; the same settings resume it.
    """

    step: int
    exported: Path | None

"""The steps of a run, one after another, and what is written between them.

Axis letters: A batches of a step, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import Mixture, batches
from ..settings import Settings
from ..step import TrainState
from .checkpoints import Checkpoints
from .evaluations import Evaluations
from .observer import Observer, Record
from .records import MetricsWriter, Trackers, Window, read, save_curve


@dataclasses.dataclass
class Steps:
    """What the steps are computed from, and what their results are written to.

    Attributes:
      evaluate: of a state, if anything is held out.
      answer: a state's (prompt, answer) of each sample prompt.
      about: what is saved with each checkpoint, besides the evaluations.
    """

    settings: Settings
    data: Mixture
    evaluate: Callable[[TrainState], Record] | None
    answer: Callable[[TrainState], list[tuple[str, str]]]
    evaluations: Evaluations
    window: Window
    metrics: MetricsWriter
    trackers: Trackers
    checkpoints: Checkpoints
    about: dict[str, Any]
    observer: Observer
    interrupt: Callable[[], bool]

    def go_on(self, step: Callable[..., Any], state: TrainState, frozen: Any, is_new: bool) -> TrainState:
        """Takes all the steps that are left, or those until the run is interrupted or its patience has ended."""
        s, done, bad_in_row = self.settings, int(state.step), int(state.bad_in_row)
        self.observer.begin(done, s.steps)
        if is_new:
            if self.evaluate is not None:
                self._write([self._evaluated({"step": 0}, state)])
            self._show(0, state)
        stream = batches(self.data, s, done)
        batch = next(stream)
        self.window.restart()
        is_last = False
        while not is_last:
            state, metrics = step(state, frozen, batch)
            done += 1
            self.window.add(done, metrics, batch)
            batch = next(stream)  # while the devices compute
            is_last = self.interrupt() or done == s.steps
            evaluates = done % s.eval_every == 0 or done == s.steps
            if is_last or evaluates or done % s.save_every == 0 or done % s.log_every == 0:
                records = self.window.records()
                bad_in_row = self._count_bad(records, bad_in_row)
                if evaluates and self.evaluate is not None:
                    records[-1] = self._evaluated(records[-1], state)
                    is_last = is_last or self.evaluations.is_exhausted(s.patience)
                eval_loss = records[-1].get("eval_loss")
                self._write(records)
                if evaluates:
                    self._show(done, state)
                is_good = eval_loss is not None and self.checkpoints.is_among_best(eval_loss)
                if is_last or is_good or done % s.save_every == 0:
                    about = {**self.about, "evaluations": self.evaluations.records}
                    self.checkpoints.save(done, state, about, eval_loss)
                self.window.restart()
        return state

    def _evaluated(self, record: Record, state: TrainState) -> Record:
        """A line of metrics with the evaluation of the state."""
        assert self.evaluate is not None
        record = {**record, **self.evaluate(state)}
        self.evaluations.add(record)
        return record

    def _write(self, records: list[Record]) -> None:
        for record in records:
            self.metrics.write(record)
            self.observer.record(record)
        self.trackers.write(records)

    def _show(self, step: int, state: TrainState) -> None:
        """Sample answers and the curve, at each evaluation and before what is evaluated is saved."""
        samples = self.answer(state)
        self.metrics.write_samples(step, samples)
        for prompt, answer in samples:
            self.observer.sample(step, prompt, answer)
        draw(self.settings)

    def _count_bad(self, records: list[Record], in_row: int) -> int:
        """How many of the latest steps, in a row, were skipped. Raises ValueError if these are too many."""
        for number, record in enumerate(records):
            in_row = 0 if record["finite"] else in_row + 1
            if in_row >= self.settings.max_bad_steps:
                self._write(records[: number + 1])
                kept = ", ".join(map(str, self.checkpoints.steps)) or "none yet"
                raise ValueError(
                    f"step {record['step']}: for {in_row} steps in a row (max_bad_steps) the loss or the gradient was "
                    "not finite; a new run with a lower lr or a longer warmup_steps may do better. Checkpoints in "
                    f"{self.settings.output}: {kept}"
                )
        return in_row


def draw(settings: Settings) -> None:
    """Draws the curve of the metrics up to now."""
    folder = Path(settings.output)
    save_curve(read(folder / "metrics.jsonl"), folder / "loss.png", str(folder))

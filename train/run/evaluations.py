"""Evaluations on held-out data: how one is computed, and what those of a run say: which is best, whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import phi3_jax

from .. import fingerprint
from ..data import Mixture, eval_batches, rows_of_evaluation
from ..settings import Settings, resolved
from ..step import TrainState, make_eval_step
from .checkpoints import Checkpoints
from .observer import Observer, Record
from .records.window import with_perplexity

_COLUMNS = ("loss", "perplexity", "accuracy", "margin")


def make_evaluation(
    settings: Settings, checkpoint: phi3_jax.Checkpoint, frozen: Any, held_out: Mixture, observer: Observer
) -> Callable[[TrainState], Record]:
    """A function that computes the means over all held-out data, under names that begin with eval_.

    It raises ValueError if no token of that data is learned.
    """
    step = make_eval_step(settings, checkpoint.config)
    total = -(-len(rows_of_evaluation(len(held_out), settings)) // resolved(settings).batch_size)

    def evaluate(state: TrainState) -> Record:
        sums: dict[str, float] = {}
        for number, batch in enumerate(eval_batches(held_out, settings)):
            observer.progress("evaluating", number, total)
            for name, value in jax.device_get(step(state.trainable, frozen, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        observer.progress("evaluating", total, total)
        weight = sums["weight"]
        if not weight:
            raise ValueError("eval_file: no token of the held-out data is learned, so there is nothing to evaluate")
        means = {name: value / weight for name, value in sums.items() if name in ("loss", "margin")}
        means["accuracy"] = sums["correct"] / weight
        return {f"eval_{name}": value for name, value in with_perplexity(means, settings).items()}

    return evaluate


def held_out_fingerprint(held_out: Mixture, settings: Settings) -> str:
    """What losses are compared by: only those on the same rows say which checkpoint is better."""
    rows = min(settings.eval_rows or len(held_out), len(held_out))
    return fingerprint.of_text(f"{held_out.fingerprint} {rows}")


class Evaluations:
    """The evaluations of a run so far. They are saved with each checkpoint, so that a resumed run knows them."""

    def __init__(self, held_out: str | None = None, records: Sequence[Record] = ()):
        """Begins, or goes on with what a checkpoint has.

        Args:
          held_out: `held_out_fingerprint`; None if nothing is held out.
          records: what `Evaluations.records` was.
        """
        self.held_out = held_out
        self.records = list(records)

    def add(self, record: Record) -> None:
        """Adds a line of metrics with an evaluation."""
        numbers = {f"eval_{name}": record.get(f"eval_{name}") for name in _COLUMNS}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items() if value is not None}
        self.records.append({"step": record["step"], **finite, "held_out": self.held_out})

    def forget_after(self, step: int) -> None:
        """The steps after this one are taken again."""
        self.records = [record for record in self.records if record["step"] <= step]

    @property
    def has_other_data(self) -> bool:
        """Whether the latest evaluation was on other held-out data, and so is not compared with the next ones."""
        return bool(self.records) and self.records[-1]["held_out"] != self.held_out

    @property
    def best(self) -> Record | None:
        """That of the lowest loss; None if no loss is a number. One that is not finite never is the lowest."""
        known = [record for record in self._comparable() if record["eval_loss"] is not None]
        return min(known, key=lambda record: (record["eval_loss"], record["step"]), default=None)

    def is_exhausted(self, patience: int) -> bool:
        """Whether the latest `patience` evaluations, or more, had no lower loss than one before; 0 is never.

        The first has none before it, also if its loss is no number.
        """
        records, best = self._comparable(), self.best
        since = records[records.index(best) + 1 :] if best is not None else records[1:]
        return 0 < patience <= len(since)

    def table(self) -> list[str]:
        """The evaluations before the first step, of the lowest loss after it, and the last, as lines of a table."""
        rows = self._rows()
        if not rows:
            return []
        known = {name for name in _COLUMNS for _, record in rows if record.get(f"eval_{name}") is not None}
        columns = [name for name in _COLUMNS if name in known or name == "loss"]
        lines = [f"{'held out':<8} {'step':>8}" + "".join(f" {name:>11}" for name in columns)]
        for title, record in rows:
            values = [record.get(f"eval_{name}") for name in columns]
            told = [f"{'-' if value is None else format(value, '.5g'):>11}" for value in values]
            lines.append(" ".join([f"{title:<8} {record['step']:>8}", *told]))
        return lines

    def _rows(self) -> list[tuple[str, Record]]:
        records = self._comparable()
        after = [record for record in records if record["step"] > 0]
        known = [record for record in after if record["eval_loss"] is not None]
        best = min(known, key=lambda record: (record["eval_loss"], record["step"]), default=None)
        rows = [("before", record) for record in records if record["step"] == 0]
        rows += [("best", best)] if best is not None else []
        return rows + [("last", record) for record in after[-1:]]

    def _comparable(self) -> list[Record]:
        return [record for record in self.records if record["held_out"] == self.held_out]


def evaluations_before(
    recorded: Mapping[str, Any] | None,
    held_out: Mixture | None,
    checkpoints: Checkpoints,
    settings: Settings,
    observer: Observer,
) -> Evaluations:
    """The evaluations that the newest checkpoint knows of; those on other data do not compete for the best any more."""
    before = [] if recorded is None else recorded.get("evaluations", [])
    if held_out is None:
        return Evaluations(None, before)
    name = held_out_fingerprint(held_out, settings)
    evaluations = Evaluations(name, before)
    others = checkpoints.compare_on(name)
    if evaluations.has_other_data:
        observer.note(
            f"the held-out rows are others than in the evaluations up to step {before[-1]['step']}, which are not "
            "compared with new ones, neither for the best nor for patience"
        )
    elif others and not before:
        told = ", ".join(map(str, others))
        observer.note(
            f"the losses of checkpoints {told} do not compete for the best: their held-out rows are not known"
        )
    return evaluations

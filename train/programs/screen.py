"""How phi3-train shows a run: bars on a terminal; in a file, a line every few seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from tqdm import tqdm

from phi3_jax.command_line.interrupts import interruptible

from ..run.observer import Observer

_LONGEST = 90  # characters of a prompt or an answer in a line
_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}"


@dataclasses.dataclass
class _Work:
    """Work before or between the steps; its bar is None in a file."""

    begun: float
    bar: tqdm[Any]
    done: int = 0
    total: int = 0

    def told(self, what: str) -> str:
        """Such as "loading: 34%, 12 s"; work that is not divided has no percentage."""
        share = f"{self.done / self.total:.0%}, " if self.total > 1 else ""
        return f"{what}: {share}{told_seconds(time.perf_counter() - self.begun)}"


class Screen(Observer):
    """Shows a run on standard error. From the first step on, signals wait for the end of a step."""

    def __init__(self, tell_every: float = 10):
        """Begins to show.

        Args:
          tell_every: seconds between two lines where standard error is no terminal; 0 is never.
        """
        self.interrupted: Callable[[], bool] = lambda: False
        self._stack = contextlib.ExitStack()
        self._work: dict[str, _Work] = {}
        self._steps: _Steps | None = None
        self._bar: tqdm[Any] | None = None
        self._is_terminal = sys.stderr.isatty()
        self._period = 1 if self._is_terminal else tell_every
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        # Compiling, for one, says nothing for a minute: so another thread looks at the clock.
        thread = threading.Thread(target=self._tell, daemon=True)
        self._stack.callback(thread.join)
        self._stack.callback(self._is_over.set)
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def progress(self, what: str, done: int, total: int) -> None:
        """Shows a bar if it takes more than a second."""
        if what not in self._work:
            bar_format = "{desc}: {elapsed}" if total == 1 else None
            bar = self._new_bar(total=total, desc=what, delay=1, leave=False, unit_scale=True, bar_format=bar_format)
            self._work[what] = _Work(time.perf_counter(), bar)
        work = self._work[what]
        work.done, work.total = done, total
        work.bar.update(done - work.bar.n)
        if done == total:
            self._work.pop(what).bar.close()
            self._restart()

    def note(self, text: str) -> None:
        """A line above the bars."""
        tqdm.write(f"phi3-train: {text}", file=sys.stderr)

    def table(self, lines: Sequence[str]) -> None:
        """The lines of the table."""
        for line in lines:
            self.note(line)

    def begin(self, step: int, steps: int) -> None:
        """The bar of the steps."""
        self.interrupted = self._stack.enter_context(interruptible())
        self._steps = _Steps(step, steps)
        self._bar = self._new_bar(total=steps, initial=step, desc="", bar_format=_BAR)

    def record(self, record: dict[str, Any]) -> None:
        """Advances the bar of the steps."""
        if "eval_loss" in record:
            self.note(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}")
        if "loss" in record and self._steps is not None and self._bar is not None:
            self._steps.add(record)
            self._bar.set_description_str(", ".join(self._steps.facts()), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """A line above the bars, and a short one."""
        self.note(f"step {step}: {_shortened(prompt)} -> {_shortened(answer)}")
        self._restart()

    def _new_bar(self, **options: Any) -> tqdm[Any]:
        """It follows the width of the terminal; tqdm shows nothing on one that says it has no columns."""
        if self._is_terminal and not os.get_terminal_size(sys.stderr.fileno()).columns:
            options |= {"ncols": 80, "nrows": 24}
        return self._stack.enter_context(tqdm(disable=None, **options))

    def _restart(self) -> None:
        """The time until the first step is no measure of the time that is left."""
        if self._steps is not None:
            self._steps.restart()

    def _tell(self) -> None:
        is_told = False
        while self._period and not self._is_over.wait(self._period):
            if not is_told and self.interrupted():
                is_told = True
                self.note("stops after this step, and saves it; Ctrl-C once more stops at once, and saves nothing")
            if self._is_terminal:
                for work in [*self._work.values()]:
                    if time.perf_counter() - work.begun > 1:
                        work.bar.refresh()
            elif parts := self._line():
                self.note(", ".join(parts))

    def _line(self) -> list[str]:
        """What goes on now, for a file."""
        parts = [] if self._steps is None else self._steps.line(self._period)
        return parts + [work.told(what) for what, work in [*self._work.items()]]


class _Steps:
    """How far the steps have come, and how fast."""

    def __init__(self, step: int, steps: int):
        self._first, self._steps = step, steps
        self._last: dict[str, Any] | None = None
        self.restart()

    def restart(self) -> None:
        """Nothing was computed yet, if no step was."""
        if self._last is None:
            self._since = self._heard = time.perf_counter()

    def add(self, record: dict[str, Any]) -> None:
        self._last, self._heard = record, time.perf_counter()

    def line(self, period: float) -> list[str]:
        """The step, how old its record is if it is old, and the facts."""
        if self._last is None:
            return [f"step {self._first}/{self._steps}"]
        age = time.perf_counter() - self._heard
        old = f" ({told_seconds(age)} ago)" if age > 1.5 * period else ""
        return [f"step {self._last['step']}/{self._steps}{old}", *self.facts()]

    def facts(self) -> list[str]:
        """Such as "loss 2.31", "5400 tokens/s", "MFU 31%", "3 min 20 s left", "pass 1.5 of 12.5"."""
        if (record := self._last) is None:
            return []
        facts = [f"loss {record['loss']:.4g}", f"{record['tokens_per_second']:.0f} tokens/s"]
        if "mfu" in record:
            facts.append(f"MFU {record['mfu']:.0%}")
        each = (self._heard - self._since) / (record["step"] - self._first)
        left = each * (self._steps - record["step"]) - (time.perf_counter() - self._heard)
        facts.append(f"{told_seconds(max(0, left))} left")
        if "passes" in record:
            whole = record["passes"] / record["step"] * self._steps
            digits = 1 if whole >= 2 else 2
            facts.append(f"pass {record['passes']:.{digits}f} of {whole:.{digits}f}")
        return facts


def told_seconds(seconds: float) -> str:
    """Such as "14 s", "3 min 20 s" or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _shortened(text: str) -> str:
    """In one line, not longer than _LONGEST, and without characters that a terminal takes as commands."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3].rstrip()}..."

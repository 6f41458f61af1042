"""phi3-train: fine-tunes a model, or trains an adapter for it.

phi3-train chats.jsonl
phi3-train chats.jsonl --set checkpoint=FOLDER --set output=runs/mine --set steps=50
phi3-train --recipe ./my_recipe.py --set lr=1e-4

What stands beside the flags is what to train on, the same as --set train_file=FILE. A recipe is
a Python file with SETTINGS; --set changes fields of it, or of the defaults. All are listed
below. The same command again goes on with a run that was stopped. Ctrl-C or SIGTERM saves and
ends it, with exit code 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from absl import flags, logging
from tqdm import tqdm

from phi3_jax.command_line.program import interruptible, run_program

from ..run.observer import Observer
from ..settings import Settings, change
from .recipe import read_recipe
from .settings_help import settings_help

_RECIPE = flags.DEFINE_string(
    "recipe",
    None,
    "A Python file with SETTINGS, such as ./my_recipe.py, or a module, such as phi3_jax.train.recipes.lora_demo.",
)
_SET = flags.DEFINE_multi_string("set", [], "name=value: one of the settings below; may be given several times.")
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_STOPPED = 130


class Screen(Observer):
    """Shows a run on standard error. From the first step on, signals wait for the end of a step."""

    def __init__(self) -> None:
        self.interrupted: Callable[[], bool] = lambda: False
        self._stack = contextlib.ExitStack()
        self._bars: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def progress(self, what: str, done: int, total: int) -> None:
        """Shows a bar if it takes more than a second."""
        if what not in self._bars:
            bar = tqdm(total=total, desc=what, delay=1, disable=None, leave=False, unit_scale=True)
            self._bars[what] = self._stack.enter_context(bar)
        self._bars[what].update(done - self._bars[what].n)
        if done == total:
            self._bars.pop(what).close()

    def note(self, text: str) -> None:
        """A line above the bars."""
        tqdm.write(f"phi3-train: {text}", file=sys.stderr)

    def table(self, lines: Sequence[str]) -> None:
        """The lines of the table."""
        for line in lines:
            self.note(line)

    def begin(self, step: int, steps: int) -> None:
        """The bar of the steps."""
        self.interrupted = self._stack.enter_context(interruptible(signal.SIGTERM))
        bar = tqdm(total=steps, initial=step, desc="steps", disable=None, bar_format=_BAR)
        self._bars["steps"] = self._stack.enter_context(bar)

    def record(self, record: dict[str, Any]) -> None:
        """Advances the bar of the steps."""
        if "eval_loss" in record:
            self.note(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}")
        if "loss" in record:
            speed = f"loss {record['loss']:.4f}, {record['tokens_per_second']:.0f} tokens/s"
            speed += f", MFU {record['mfu']:.0%}" if "mfu" in record else ""
            self._bars["steps"].set_postfix_str(speed, refresh=False)
            self._bars["steps"].update(record["step"] - self._bars["steps"].n)


def main(files: Sequence[str] = ()) -> int:
    """Trains, on these files where any are given, and says where the result is."""
    settings = _settings(files)
    logging.set_verbosity(logging.FATAL)  # Orbax logs its work, and errors that it also raises
    from ..run.loop import train  # needs the extra `train`; --help does not

    begun = time.perf_counter()
    with Screen() as screen:
        outcome = train(settings, screen, lambda: screen.interrupted())
    if outcome.exported is None:
        print(f"phi3-train: stopped after step {outcome.step}; the same command goes on from there", file=sys.stderr)
        return _STOPPED
    minutes = (time.perf_counter() - begun) / 60
    print(f"{outcome.exported}: {outcome.step} steps, {minutes:.1f} minutes; the curve is {settings.output}/loss.png")
    return 0


def _settings(files: Sequence[str]) -> Settings:
    """The recipe's settings, or the defaults, changed by what the command line says."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for each in files:
        if each.partition("=")[0] in names:
            raise ValueError(f"{each}: write --set {each}")
        if each.endswith(".py"):
            raise ValueError(f"{each}: write --recipe {each}")
    if not (files or _SET.value or _RECIPE.value):
        raise ValueError("say what to train on: phi3-train chats.jsonl, or --recipe FILE; phi3-train --help tells more")
    settings = Settings() if _RECIPE.value is None else read_recipe(_RECIPE.value)
    return change(settings, [*([f"train_file={','.join(files)}"] if files else []), *_SET.value])


def run() -> None:
    """The console script."""
    run_program(
        "phi3-train",
        main,
        {"What to train": [_RECIPE, _SET]},
        takes_arguments=True,
        more_help=settings_help(),
        instead={field.name: f"--set {field.name}=VALUE" for field in dataclasses.fields(Settings)},
    )


if __name__ == "__main__":
    run()

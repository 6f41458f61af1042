"""phi3-train: fine-tunes a model, or trains an adapter for it.

phi3-train chats.jsonl
phi3-train chats.jsonl --set checkpoint=FOLDER --set output=runs/mine --set steps=50
phi3-train --recipe ./my_recipe.py --set lr=1e-4

What stands beside the flags is what to train on, the same as --set train_file=FILE. A recipe is
a Python file with SETTINGS; --set changes fields of it, or of the defaults. All are listed
below; what is auto a run chooses by its devices and the memory that its step takes, and tells.
The same command again goes on with a run that was stopped. Ctrl-C, SIGTERM or SIGHUP ends it
after the step, which is saved (before the first one, at once); exit codes are 130, 143, 129.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from phi3_jax.command_line.program import run_program

from ..settings import ELSEWHERE, Settings, change, suggestion
from .recipe import read_recipe
from .screen import Screen
from .settings_help import settings_help

_RECIPE = flags.DEFINE_string(
    "recipe",
    None,
    "A Python file with SETTINGS, such as ./my_recipe.py, or a module, such as phi3_jax.train.recipes.lora_demo.",
)
_SET = flags.DEFINE_multi_string("set", [], "name=value: one of the settings below; may be given several times.")
_TELL_EVERY = flags.DEFINE_integer(
    "tell_every", 10, "Seconds between lines of progress where no terminal shows bars; 0 is never.", lower_bound=0
)


def main(files: Sequence[str] = ()) -> int:
    """Trains, on these files where any are given, and says where the result is."""
    settings = _settings(files)
    logging.set_verbosity(logging.FATAL)  # Orbax logs its work, and errors that it also raises
    from ..run.loop import train  # needs the extra `train`; --help does not

    begun = time.perf_counter()
    with Screen(_TELL_EVERY.value) as screen:
        outcome = train(settings, screen, lambda: screen.interrupted())
    if outcome.exported is None:
        print(f"phi3-train: stopped after step {outcome.step}; the same command goes on from there", file=sys.stderr)
        return 1  # rather, the program ends by the signal
    minutes = (time.perf_counter() - begun) / 60
    print(f"{outcome.exported}: {outcome.step} steps, {minutes:.1f} minutes; the curve is {settings.output}/loss.png")
    return 0


def _settings(files: Sequence[str]) -> Settings:
    """The recipe's settings, or the defaults, changed by what the command line says."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for each in files:
        name, equals, _ = each.partition("=")
        if name in names:
            raise ValueError(f"{each}: write --set {each}")
        if equals and not Path(each).exists():
            raise ValueError(f"{each}: no such file; settings are written --set NAME=VALUE{suggestion(name)}")
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
        {"What to train": [_RECIPE, _SET], "What it shows": [_TELL_EVERY]},
        takes_arguments=True,
        more_help=settings_help(),
        instead={
            given: f"--set {name}=VALUE"
            for given, name in [*ELSEWHERE.items(), *((field.name,) * 2 for field in dataclasses.fields(Settings))]
        },
    )


if __name__ == "__main__":
    run()

"""phi3-train: fine-tunes a model, or trains an adapter for it.

phi3-train --set train_file=chats.jsonl --set output=runs/mine
phi3-train --recipe phi3_jax.train.recipes.lora_demo --set lr=1e-4 --set steps=20

A recipe is a Python module with SETTINGS; --set changes fields of it, or of the defaults: --set checkpoint=FOLDER. The
same command again goes on with a run that was stopped. Ctrl-C or SIGTERM saves and ends it, with exit code 130.
"""

from __future__ import annotations

import importlib
import os
import sys
import time

from absl import flags, logging

from phi3_jax.command_line.program import run_program

from ..settings import Settings, change
from .screen import Screen

_RECIPE = flags.DEFINE_string("recipe", None, "A module with SETTINGS, here or installed.")
_SET = flags.DEFINE_multi_string(
    "set", [], "name=value: a field of the settings (settings.py tells all); may be given several times."
)
_TELL_EVERY = flags.DEFINE_integer(
    "tell_every", 10, "Seconds between lines of progress where no terminal shows bars; 0 is never.", lower_bound=0
)
_STOPPED = 130


def main() -> int:
    """Trains, and says where the result is."""
    settings = _settings()
    logging.set_verbosity(logging.FATAL)  # Orbax logs its work, and errors that it also raises
    from ..run.loop import train  # needs the extra `train`; --help does not

    begun = time.perf_counter()
    with Screen(_TELL_EVERY.value) as screen:
        outcome = train(settings, screen, lambda: screen.interrupted())
    if outcome.exported is None:
        print(f"phi3-train: stopped after step {outcome.step}; the same command goes on from there", file=sys.stderr)
        return _STOPPED
    minutes = (time.perf_counter() - begun) / 60
    print(f"{outcome.exported}: {outcome.step} steps, {minutes:.1f} minutes; the curve is {settings.output}/loss.png")
    return 0


def _settings() -> Settings:
    """The recipe's settings, changed by --set."""
    if _RECIPE.value is None:
        if not _SET.value:
            raise ValueError("name a --recipe, or at least --set train_file=FILE; see phi3-train --help")
        return change(Settings(), _SET.value)
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        settings = importlib.import_module(_RECIPE.value).SETTINGS
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--recipe {_RECIPE.value}: {error}; name a module with SETTINGS, with dots between") from None
    return change(settings, _SET.value)


def run() -> None:
    """The console script."""
    run_program("phi3-train", main, {"What to train": [_RECIPE, _SET], "What it shows": [_TELL_EVERY]})


if __name__ == "__main__":
    run()

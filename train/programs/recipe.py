"""Reads a recipe, which is a Python file of the user's own, or a module that is installed or lies here."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from phi3_jax.spelling import did_you_mean

from .. import recipes
from ..settings import Settings, suggestion

_SHORTEST = "from phi3_jax.train.settings import Settings; SETTINGS = Settings(train_file=...)"


def read_recipe(name: str) -> Settings:
    """Executes a recipe -> its SETTINGS.

    Args:
      name: a path, which ends in .py or has a separator in it; or a module, with dots.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be executed, or has no SETTINGS; says where.
    """
    is_file = name.endswith(".py") or os.sep in name
    if is_file and not Path(name).is_file():
        raise FileNotFoundError(f"--recipe {name}: no such file; name a Python file, or a module with dots between")
    beside = str(Path(name).parent.resolve()) if is_file else os.getcwd()  # as `python FILE` and `python -m` do
    sys.path.insert(0, beside)
    try:
        found = runpy.run_path(name, run_name=Path(name).stem) if is_file else vars(importlib.import_module(name))
    except Exception as error:  # all that a user's code may raise
        raise ValueError(f"--recipe {name}: {_told(error, name, is_file)}") from None
    finally:
        sys.path.remove(beside)
    return _settings(name, found)


def _settings(name: str, found: dict[str, Any]) -> Settings:
    settings = found.get("SETTINGS")
    if settings is None:
        other = next((f"; it has {each}" for each, value in found.items() if isinstance(value, Settings)), "")
        raise ValueError(f"--recipe {name}: it has no SETTINGS{other}; write {_SHORTEST}")
    if not isinstance(settings, Settings):
        raise ValueError(f"--recipe {name}: its SETTINGS are of type {type(settings).__name__}; write {_SHORTEST}")
    return settings


def _told(error: Exception, name: str, is_file: bool) -> str:
    """One line that says where an error is, and what."""
    if isinstance(error, ModuleNotFoundError) and not is_file and (error.name or "") in _above(name):
        published = [each.name for each in pkgutil.iter_modules(recipes.__path__)]
        near = did_you_mean(name.rpartition(".")[2], published, f"{recipes.__name__}.")
        return f"there is no module {error.name}; name one that is here or installed, or a file that ends in .py{near}"
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or name).name}, line {error.lineno}: {error.msg}"
    text = " ".join(str(error).split())
    if unknown := re.fullmatch(r"Settings\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        text = f"there is no setting {unknown[1]}{suggestion(unknown[1])}"
    elif isinstance(error, ImportError) and "relative import" in text:
        text += "; write from phi3_jax.train.settings import Settings"
    elif not isinstance(error, ValueError | ImportError):
        text = f"{type(error).__name__}: {text}"
    ours = str(Path(__file__).parent.parent)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith((ours, "<"))]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {text}" if frames else text


def _above(name: str) -> list[str]:
    """The module of this name, and the packages that it is in."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]

"""What a run leaves at its end: the adapter or the model of the last step, and of the best one.

Each is replaced as a whole: a kill leaves the old one or the new one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.checkpoint import save_adapter, write_trained_on
from phi3_jax.checkpoint.atomic_write import exchange, new_file
from phi3_jax.json_files import is_whole, read_object

from ..settings import Settings, adapter_config
from ..step import TrainState
from .checkpoints import Checkpoints
from .observer import Observer

_STEP = "training.json"  # in an exported folder: the step that it is of, and what else is there


def export_folder(settings: Settings) -> Path:
    """Where the adapter or the model is written at the end."""
    return Path(settings.output) / ("adapter" if settings.train == "lora" else "model")


def best_folder(settings: Settings) -> Path:
    """Where the adapter or model of the lowest held-out loss is written, if it is not that of the last step."""
    last = export_folder(settings)
    return last.with_name(f"{last.name}-best")


def export_last(
    settings: Settings,
    checkpoint: phi3_jax.Checkpoint,
    checkpoints: Checkpoints,
    like: Any,
    state: TrainState | None,
    done: int,
    weights: str,
) -> None:
    """Writes the last step's adapter or model, where it is not there already.

    Args:
      state: of the last step; None if no step was taken now.
      weights: the `kind_of_weights` below an adapter.
    """
    last = export_folder(settings)
    if state is not None or exported_step(last) != done:
        state = checkpoints.read(done, like) if state is None else state
        replace_export(last, done, functools.partial(_write_export, settings, checkpoint, weights, state))


def export_best(
    settings: Settings,
    checkpoint: phi3_jax.Checkpoint,
    checkpoints: Checkpoints,
    like: Any,
    done: int,
    lowest: int | None,
    observer: Observer,
    weights: str,
) -> None:
    """Writes the best step's adapter or model, where that is not the last step's and not there already.

    Args:
      weights: see `export_last`.
      lowest: the step of the lowest loss of all, whose checkpoint need not be kept any more.
    """
    best, step = best_folder(settings), checkpoints.best
    if step is None or exported_step(best) in {step, lowest} - {None}:
        return
    if step == done:
        remove_export(best)  # of an earlier step, which is not the best any more
        return
    try:
        state = checkpoints.read(step, like)
    except ValueError as error:
        observer.note(f"{best}: not written, because {error}")
        return
    replace_export(best, step, functools.partial(_write_export, settings, checkpoint, weights, state))
    observer.note(f"{best}: of step {step}, whose held-out loss is the lowest of those kept")


def _write_export(
    settings: Settings, checkpoint: phi3_jax.Checkpoint, weights: str, state: TrainState, folder: Path
) -> None:
    """Writes the adapter in PEFT's format, or the model in Hugging Face's."""
    if settings.train == "lora":
        save_adapter(folder, state.trainable, adapter_config(settings), checkpoint.config, settings.checkpoint)
        write_trained_on(folder, weights)
    else:
        phi3_jax.save(dataclasses.replace(checkpoint, params=state.trainable), folder)


def exported_step(folder: Path) -> int | None:
    """The step that an exported folder is of; None if there is no such folder, or it does not say or lacks a file."""
    try:
        found = read_object(folder / _STEP)
        step, names = found["step"], found.get("files", [])
        return step if is_whole(step) and all((folder / name).exists() for name in names) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_exported(settings: Settings, done: int, best: int | None, lowest: int | None = None) -> bool:
    """Whether there is nothing to export.

    Args:
      done: the last step.
      best: that of the lowest held-out loss of the checkpoints that are kept.
      lowest: that of the lowest of all.
    """
    if exported_step(export_folder(settings)) != done:
        return False
    return best in (None, done) or exported_step(best_folder(settings)) in {best, lowest} - {None}


def disown_exports_after(step: int, settings: Settings) -> None:
    """Exports of later steps do not say their step any more, because these are taken again, and may become others."""
    for folder in (export_folder(settings), best_folder(settings)):
        if (exported_step(folder) or 0) > step:
            (folder / _STEP).unlink()


def replace_export(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Puts what `write` writes into a new folder in the place of a folder, when it is whole."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    write(new)
    about = {"step": step, "files": sorted(path.name for path in new.iterdir())}
    with new_file(new / _STEP) as partial:
        partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
    if folder.exists() and exchange(new, folder):  # who reads it finds one or the other
        old = new
    else:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    _remove(old, folder)


def remove_export(folder: Path) -> None:
    """Removes a folder, which need not be there."""
    _remove(folder, folder)


def settle_exports(settings: Settings) -> None:
    """Undoes what a kill interrupted: the old folder has its name again, and what is not whole is removed."""
    for folder in (export_folder(settings), best_folder(settings)):
        new, old = _beside(folder, "new"), _beside(folder, "old")
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (new, old, _beside(folder, "removed")):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path, folder: Path) -> None:
    """What is half removed has another name, so that nobody takes it for whole."""
    removed = _beside(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")

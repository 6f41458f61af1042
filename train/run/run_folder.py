"""The folder of a run: its lock, its names, what it was made from, and whether a run may go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import phi3_jax
from phi3_jax.checkpoint.atomic_write import new_file, remove_partials

from .. import fingerprint
from ..adapters import OWN
from ..settings import CHOSEN, Settings
from ..values import spell
from .exports import best_folder, export_folder

# The settings that may differ when a run is resumed. Of the training file and init_adapter the contents are compared,
# not the names.
_FREE = {
    "output", "train_file", "init_adapter", "eval_file", "eval_rows", "steps", "epochs", "log_every", "eval_every",
    "save_every", "patience", "samples", "sample_prompts", "trackers", "keep_last", "keep_best", "max_bad_steps",
}  # fmt: skip
_REMEDY = "go on with the same, or name another output for a new run, or remove that folder"
# What is compared of a run's contents, in words.
_CONTENTS = {
    "data": "the rows of {train_file}",
    "base": "the weights of {checkpoint}",
    "configuration": "the configuration of {checkpoint}",
    "tokenizer": "the tokenizer or chat template of {checkpoint}",
    "init_adapter": "init_adapter {init_adapter}",
    "dpo_reference": "dpo_reference {dpo_reference}",
}


def describe(checkpoint: phi3_jax.Checkpoint, data: str, adapters: Mapping[str, str]) -> dict[str, Any]:
    """What is saved with a checkpoint to identify its run besides the settings, as JSON.

    Args:
      data: the fingerprint of the dataset.
      adapters: those of adapters that the run reads, by the setting that names them.
    """
    assert checkpoint.tokenizer is not None
    contents = {
        "data": data,
        "base": fingerprint.of_weights(checkpoint.params),
        "configuration": fingerprint.of_config(checkpoint.config),
        "tokenizer": fingerprint.of_tokenizer(checkpoint.tokenizer),
    }
    device = jax.devices()[0].device_kind
    versions = {
        "phi3_jax": phi3_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device}",
    }
    return {"versions": versions} | contents | dict(adapters)


def check_settings(recorded: Mapping[str, Any] | None, settings: Settings, done: int) -> None:
    """Raises ValueError if the folder is another run's, as far as that can be told before the model is loaded.

    Args:
      recorded: what `describe` gave to the newest checkpoint there; None if there is none.
      done: the step of that checkpoint.
    """
    if recorded is None:
        for exported in (export_folder(settings), best_folder(settings)):
            if exported.exists():
                raise ValueError(
                    f"{exported}: from an earlier run, which cannot go on, because {settings.output}/checkpoints is "
                    "empty; name another output, or remove it"
                )
        return
    there, here = _fields(Settings()) | recorded["settings"], _fields(settings)
    free = _FREE
    if there["init_adapter"] and settings.init_adapter:  # its contents are compared, and it says what these are
        free = free.union(OWN)
    if other := [name for name in here if name not in free and there[name] != here[name]]:
        told = "; ".join(f"{name}={spell(there[name])} there, {spell(here[name])} here" for name in other)
        raise ValueError(f"{settings.output} has checkpoints of a run with other settings ({told}): {_REMEDY}")
    if not settings.epochs:
        check_steps(done, settings, settings.all_steps())


def check_steps(done: int, settings: Settings, steps: int) -> None:
    """Raises ValueError if more steps are done than there are to be: `steps`, which may be those of `epochs`."""
    if steps < done:
        asked = f"epochs={settings.epochs}: that is {steps} steps, and" if settings.epochs else f"steps={steps}:"
        raise ValueError(
            f"{asked} the run in {settings.output} has done {done}; give at least as many, or name another output for "
            "a new run"
        )


def check_contents(recorded: Mapping[str, Any] | None, about: Mapping[str, Any], settings: Settings) -> list[str]:
    """Compares what the run in the folder was made from with what `describe` gives now.

    Returns:
      What to tell of differences that are allowed.

    Raises:
      ValueError: they are not; it names all of them.
    """
    if recorded is None:
        return []
    names = [name for name in _CONTENTS if name in about or name in recorded]
    # Earlier versions recorded less, but had no adapters to begin with.
    unknown = [name for name in names if name not in recorded and name not in ("init_adapter", "dpo_reference")]
    values = _fields(settings) | {"train_file": ", ".join(settings.train_files)}
    in_words = {name: _CONTENTS[name].format(**values).strip() for name in names}
    if other := [in_words[name] for name in names if name not in unknown and recorded.get(name) != about.get(name)]:
        raise ValueError(
            f"{settings.output}: not what they were when the run there began are {'; '.join(other)}: {_REMEDY}"
        )
    notes = []
    if unknown:
        told = "; ".join(in_words[name] for name in unknown)
        notes.append(
            f"the checkpoints are of an earlier version, which did not record, so that was not compared: {told}"
        )
    before, now = recorded.get("versions", {}), about["versions"]
    if changed := [name for name in ("jax", "device") if name in before and before[name] != now[name]]:
        told = "; ".join(f"{name} {before[name]} before, {now[name]} now" for name in changed)
        notes.append(f"{told}: the last digits may differ from those of a run on one of them")
    return notes


def recorded_settings(given: Settings, resolved: Settings) -> dict[str, Any]:
    """What is saved with a checkpoint of the settings: those that were given, and the choices where they are "auto"."""
    chosen = {name: getattr(resolved, name) for name in CHOSEN}
    return {"settings": _fields(given) | chosen}


def write_settings(about: Mapping[str, Any], settings: Settings) -> None:
    """Writes settings.json for readers: `about`, with the settings as they came to be. Raises OSError."""
    about = {"settings": _fields(settings), **about}
    with new_file(Path(settings.output) / "settings.json", overwrite=True) as partial:
        partial.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fields(settings: Settings) -> dict[str, Any]:
    fields = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Locks the folder, which is created if necessary, against other training processes; a kill leaves no lock.

    What kills have left of files is removed.

    Raises:
      OSError: another process does, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(f"output={folder}: there is a file of this name, or of a folder above; name a folder") from None
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read(300).strip() or "another process"
            raise OSError(f"{folder}: {process} is training there; name another output") from None
        except OSError as error:
            raise OSError(
                f"output={folder}: cannot be locked ({error.strerror}), so that two could train there; name a folder "
                "on another disk"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        remove_partials(folder)
        yield

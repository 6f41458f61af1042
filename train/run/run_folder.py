"""The folder of a run: its lock, its names, and whether a run may go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..settings import Settings

# The settings that may differ when a run is resumed. Of the training file and init_adapter the contents are compared,
# not the names.
_FREE = {
    "output", "train_file", "init_adapter", "eval_file", "log_every", "eval_every", "save_every", "keep_last",
    "keep_best", "max_bad_steps",
}  # fmt: skip
_REMEDY = "go on with the same, or name another output for a new run, or remove that folder"


def export_folder(settings: Settings) -> Path:
    """Where the adapter or the model is written at the end."""
    return Path(settings.output) / ("adapter" if settings.train == "lora" else "model")


def best_folder(settings: Settings) -> Path:
    """Where the adapter or model of the lowest held-out loss is written, if it is not that of the last step."""
    last = export_folder(settings)
    return last.with_name(f"{last.name}-best")


def describe(settings: Settings, data: str, adapters: Mapping[str, str]) -> dict[str, Any]:
    """What is saved with a checkpoint to identify its run, as JSON.

    Args:
      data: the fingerprint of the dataset.
      adapters: those of adapters that the run reads, by the setting that names them.
    """
    fields = dataclasses.asdict(settings)
    listed = {name: _listed(value) for name, value in fields.items()}
    return {"settings": listed, "data": data, "adapters": dict(adapters)}


def check_settings(recorded: Mapping[str, Any] | None, settings: Settings) -> None:
    """Raises ValueError if the folder is another run's.

    Args:
      recorded: what `describe` gave to the newest checkpoint there; None if there is none.
    """
    if recorded is None:
        for exported in (export_folder(settings), best_folder(settings)):
            if exported.exists():
                raise ValueError(f"{exported}: from an earlier run; name another output, or remove it")
        return
    defaults = describe(Settings(), "", {})["settings"]
    there, here = defaults | recorded["settings"], describe(settings, "", {})["settings"]
    if other := [name for name in here if name not in _FREE and there[name] != here[name]]:
        told = "; ".join(f"{name}={there[name]} there, {here[name]} here" for name in other)
        raise ValueError(f"{settings.output} has checkpoints of a run with other settings ({told}): {_REMEDY}")


def check_data(recorded: Mapping[str, Any] | None, settings: Settings, data: str) -> None:
    """Raises ValueError if the run in the folder began with other data."""
    if recorded is not None and recorded["data"] != data:
        raise ValueError(
            f"{settings.train_file}: gives other rows than when the run in {settings.output} began: {_REMEDY}"
        )


def check_adapters(recorded: Mapping[str, Any] | None, settings: Settings, adapters: Mapping[str, str]) -> None:
    """Raises ValueError if the adapters that the run reads are not those that it began with."""
    began = {} if recorded is None else recorded.get("adapters", {})
    for setting in [*began, *adapters] if recorded is not None else ():
        if began.get(setting) != adapters.get(setting):
            raise ValueError(
                f"{setting}={getattr(settings, setting)}: not the adapter with which the run in {settings.output} "
                f"began: {_REMEDY}"
            )


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Locks the folder, which is created if necessary, against other training processes; a kill leaves no lock.

    Raises:
      OSError: another process does, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder}: another process is training there; name another output") from None
        yield


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

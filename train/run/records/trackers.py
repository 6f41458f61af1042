"""Where a run's metrics go besides metrics.jsonl and TensorBoard: metrics.csv, Weights & Biases, MLflow.

The last two are sent through their own packages, which read their own environment variables (WANDB_MODE,
MLFLOW_TRACKING_URI, ...). A run that is resumed goes on in the same run there.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.checkpoint.atomic_write import new_file

from ...settings import Settings
from ..observer import Observer, Record
from .metrics import read

_PROJECT = "phi3_jax"
_REQUEST = 100  # steps in one request to MLflow, which takes up to 1000 numbers


class _Tracker(Protocol):
    """Attributes: next_step, the first that it has not got yet."""

    next_step: int

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self, is_whole: bool) -> None: ...


class Trackers:
    """The trackers of a run."""

    def __init__(self, trackers: dict[str, _Tracker], observer: Observer):
        self._trackers, self._observer = trackers, observer

    def write(self, records: Sequence[Record]) -> None:
        """Sends each tracker the records that it does not have. One that fails is told of, and left out after that."""
        for name, tracker in [*self._trackers.items()]:
            try:
                if new := [record for record in records if record["step"] >= tracker.next_step]:
                    tracker.write(new)
            except Exception as error:  # each package has its own
                del self._trackers[name]
                self._observer.note(
                    f"{name} gets no more metrics ({_first_line(error)}); metrics.jsonl has them all, and the same "
                    "command sends them when it goes on"
                )

    def close(self, is_whole: bool) -> None:
        """Tells each whether the run came to its end."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(is_whole)
            except Exception as error:
                self._observer.note(f"{name}: {_first_line(error)}")


def require_trackers(settings: Settings) -> None:
    """Raises ImportError if the package of a tracker is not installed."""
    for name in settings.trackers:
        if name != "csv":
            _package(name)


@contextlib.contextmanager
def open_trackers(settings: Settings, folder: Path, is_new: bool, observer: Observer) -> Iterator[Trackers]:
    """Yields the trackers that the settings name, which get what metrics.jsonl has already.

    Args:
      is_new: the run begins; otherwise it goes on, there too.

    Raises:
      ValueError: a tracker cannot begin; tells what its package says.
    """
    makers: dict[str, Callable[[Settings, Path, bool], _Tracker]] = {"csv": _Csv, "wandb": _Wandb, "mlflow": _Mlflow}
    opened: dict[str, _Tracker] = {}
    trackers, is_whole = Trackers(opened, observer), False
    try:
        for name in settings.trackers:
            try:
                opened[name] = makers[name](settings, folder, is_new)
            except Exception as error:
                raise ValueError(f"trackers={name}: {_first_line(error)}") from error
        trackers.write(read(folder / "metrics.jsonl"))
        yield trackers
        is_whole = True
    finally:
        trackers.close(is_whole)


class _Csv:
    """metrics.csv: a column for each number; a cell is empty where a step has none, or one that is not finite."""

    def __init__(self, settings: Settings, folder: Path, is_new: bool):
        self._path, self._metrics, self._columns = folder / "metrics.csv", folder / "metrics.jsonl", ["step"]
        self.next_step = 0
        self._rewrite(read(self._metrics))

    def write(self, records: Sequence[Record]) -> None:
        if any(record.keys() - set(self._columns) for record in records):
            self._rewrite(read(self._metrics))
        else:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(map(_finite, records))
        self.next_step = records[-1]["step"] + 1

    def _rewrite(self, records: Sequence[Record]) -> None:
        """With the columns that there are now: those of evaluation come later than the others, or earlier."""
        names = dict.fromkeys(name for record in records for name in record)
        self._columns = ["step", *(name for name in names if name != "step")]
        with new_file(self._path, overwrite=True) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(records)
        self.next_step = records[-1]["step"] + 1 if records else 0

    def close(self, is_whole: bool) -> None:
        pass


class _Wandb:
    """A run of Weights & Biases, whose id is in the folder."""

    def __init__(self, settings: Settings, folder: Path, is_new: bool):
        kept = _Kept(folder / "wandb_id", is_new)
        self._run = _package("wandb").init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            dir=str(folder),
            config=dataclasses.asdict(settings),
            id=kept.value,
            resume="allow",
        )
        kept.write(self._run.id)
        self.next_step = self._run.starting_step  # it takes no earlier ones

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log({k: v for k, v in _finite(record).items() if k != "step"}, step=record["step"])
        self.next_step = records[-1]["step"] + 1

    def close(self, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


class _Mlflow:
    """A run of MLflow, whose id is in the folder."""

    def __init__(self, settings: Settings, folder: Path, is_new: bool):
        kept = _Kept(folder / "mlflow_run_id", is_new)
        self._client = _package("mlflow").MlflowClient()
        self._entities = importlib.import_module("mlflow.entities")
        self.next_step = 0
        if kept.value is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
            fields = dataclasses.asdict(settings).items()
            parameters = [self._entities.Param(key, str(value)) for key, value in fields]
            self._client.log_batch(self._id, params=parameters)
            kept.write(self._id)
        else:
            self._id = kept.value
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "loss")
            self.next_step = max((metric.step for metric in history), default=-1) + 1

    def write(self, records: Sequence[Record]) -> None:
        now, metric = round(time.time() * 1000), self._entities.Metric
        for begin in range(0, len(records), _REQUEST):
            some = map(_finite, records[begin : begin + _REQUEST])
            numbers = [metric(k, v, now, each["step"]) for each in some for k, v in each.items() if k != "step"]
            for first in range(0, len(numbers), 1000):
                self._client.log_batch(self._id, metrics=numbers[first : first + 1000])
        self.next_step = records[-1]["step"] + 1

    def close(self, is_whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_whole else "FAILED")


class _Kept:
    """The id of a run elsewhere, in a file; a new run has none."""

    def __init__(self, path: Path, is_new: bool):
        self._path = path
        self.value = None if is_new or not path.exists() else path.read_text(encoding="utf-8").strip() or None

    def write(self, value: str) -> None:
        with new_file(self._path, overwrite=True) as partial:
            partial.write_text(f"{value}\n", encoding="utf-8")


def _finite(record: Record) -> Record:
    """Without nulls and what metrics.jsonl writes as null."""
    return {k: v for k, v in record.items() if v is not None and abs(v) < float("inf")}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"trackers={name} needs a package ({error}): pip install 'phi3_jax[{name}]'") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""Metrics in csv, Weights & Biases and MLflow: the same numbers as in metrics.jsonl, also in a run that is resumed."""

import csv
import dataclasses
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.train.run.observer import Observer, Record
from phi3_jax.train.run.records.metrics import MetricsWriter, read
from phi3_jax.train.run.records.trackers import open_trackers, require_trackers
from phi3_jax.train.settings import Settings

BEFORE: list[Record] = [
    {"step": 0, "eval_loss": 4.5},
    {"step": 1, "loss": 4.25, "lr": 1e-4},
    {"step": 2, "loss": float("nan"), "lr": 2e-4},
    {"step": 3, "loss": 3.5, "lr": 3e-4, "eval_loss": 3.75},
]
KILLED: list[Record] = [{"step": 4, "loss": 3.25, "lr": 4e-4}]
AFTER: list[Record] = [{"step": 4, "loss": 3.25, "lr": 4e-4}, {"step": 5, "loss": 3.0, "lr": 5e-4, "margin": 0.5}]


class Heard(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def write(settings: Settings, step: int, parts: list[list[Record]], heard: Observer | None = None) -> None:
    """A part of a run, which begins after a step; -1 is a new one."""
    folder = Path(settings.output)
    with (
        MetricsWriter(folder, step) as metrics,
        open_trackers(settings, folder, step == -1, heard or Observer()) as trackers,
    ):
        for records in parts:
            for record in records:
                metrics.write(record)
            trackers.write(records)


def whole(settings: Settings) -> None:
    """A run that is killed after step 4, and goes on from step 3."""
    write(settings, -1, [BEFORE[:1], BEFORE[1:], KILLED])
    write(settings, 3, [AFTER])


def cells(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def finite(records: list[Record]) -> list[Record]:
    return [{name: value for name, value in each.items() if value is not None} for each in records]


def test_csv_has_the_numbers_of_metrics_jsonl(tmp_path):
    settings = Settings(output=str(tmp_path), trackers=("csv",))
    whole(settings)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == [
        "step,eval_loss,loss,lr,margin",
        "0,4.5,,,",
        "1,,4.25,0.0001,",
        "2,,,0.0002,",
        "3,3.75,3.5,0.0003,",
        "4,,3.25,0.0004,",
        "5,,3.0,0.0005,0.5",
    ]
    assert cells(tmp_path / "metrics.csv") == finite(read(tmp_path / "metrics.jsonl"))


def test_csv_that_is_asked_for_later_has_all_steps(tmp_path):
    settings = Settings(output=str(tmp_path))
    write(settings, -1, [BEFORE])
    assert not (tmp_path / "metrics.csv").exists()
    write(dataclasses.replace(settings, trackers=("csv",)), 3, [AFTER[:1], AFTER[1:]])
    assert cells(tmp_path / "metrics.csv") == finite(read(tmp_path / "metrics.jsonl"))
    write(dataclasses.replace(settings, trackers=("csv",)), -1, [])
    assert (tmp_path / "metrics.csv").read_text() == "step\n"


class StandIn:
    """What is used of wandb: a run takes no step that is not later than those it has."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.ended: list[int] = []
        self.fails_at: int | None = None

    def init(self, *, id: str | None, **more: Any) -> Any:  # noqa: A002
        assert more["config"]["lr"] == 1e-4
        name = id or f"run-{len(self.runs)}"
        lines = self.runs.setdefault(name, [])

        def log(values: dict[str, float], step: int) -> None:
            if step == self.fails_at:
                raise ConnectionError("no network\nand more")
            assert not lines or step > lines[-1][0]
            lines.append((step, values))

        begins = lines[-1][0] + 1 if lines else 0
        return types.SimpleNamespace(
            id=name, starting_step=begins, log=log, finish=lambda exit_code: self.ended.append(exit_code)
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_a_run_elsewhere_is_gone_on_with(tmp_path, stand_in):
    settings = Settings(output=str(tmp_path), trackers=("wandb",))
    whole(settings)
    steps = [{"step": step, **values} for step, values in stand_in.runs["run-0"]]
    assert steps == finite(read(tmp_path / "metrics.jsonl"))
    assert stand_in.ended == [0, 0]
    with pytest.raises(KeyboardInterrupt), open_trackers(settings, tmp_path, True, Observer()):
        raise KeyboardInterrupt
    assert stand_in.runs.keys() == {"run-0", "run-1"}  # a new run has a new one
    assert stand_in.ended[2:] == [1]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, stand_in):
    settings, heard = Settings(output=str(tmp_path), trackers=("wandb", "csv")), Heard()
    stand_in.fails_at = 2
    write(settings, -1, [BEFORE, KILLED], heard)
    assert heard.notes == [
        "wandb gets no more metrics (no network); metrics.jsonl has them all, and the same command sends them when it "
        "goes on"
    ]
    assert len(cells(tmp_path / "metrics.csv")) == 5
    stand_in.fails_at = None
    write(settings, 4, [AFTER[1:]])
    assert [step for step, _ in stand_in.runs["run-0"]] == [0, 1, 2, 3, 4, 5]


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, stand_in, monkeypatch):
    def init(**_: Any) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(stand_in, "init", init)
    settings = Settings(output=str(tmp_path), trackers=("wandb",))
    with pytest.raises(ValueError, match=r"^trackers=wandb: No API key configured\.$"):
        write(settings, -1, [])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    settings = Settings(trackers=("csv", name))
    with pytest.raises(
        ImportError, match=rf"^trackers={name} needs a package \(.*\): pip install 'phi3_jax\[{name}\]'$"
    ):
        require_trackers(settings)
    require_trackers(Settings(trackers=("csv",)))


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: pip install 'phi3_jax[{name}]'")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_in_a_local_file(tmp_path, monkeypatch):
    mlflow = installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    settings = Settings(output=str(tmp_path / "run"), trackers=("mlflow",))
    whole(settings)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("phi3_jax").experiment_id])
    assert (run.info.status, run.info.run_name, run.data.params["lr"]) == ("FINISHED", "run", "0.0001")
    expected = finite(read(tmp_path / "run" / "metrics.jsonl"))
    for name in ("loss", "eval_loss", "lr", "margin"):
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert history == [(each["step"], each[name]) for each in expected if name in each], name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = Settings(output=str(tmp_path / "run"), trackers=("wandb",))
    whole(settings)
    name = (tmp_path / "run" / "wandb_id").read_text().strip()
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2  # of one run; `wandb sync` joins them
    content = b"".join(path.read_bytes() for path in files)
    for number in (b"4.25", b"3.75", b"0.0005"):
        assert number in content

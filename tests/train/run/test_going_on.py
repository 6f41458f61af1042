"""Runs that go on after their end, end early, or are no longer what they were."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from training_runs import Heard, shared_programs, tensors, untimed, write_data, write_run

import phi3_jax
from phi3_jax.checkpoint import atomic_write
from phi3_jax.train.data import batches, prepare
from phi3_jax.train.run import exports, loop
from phi3_jax.train.run.exports import exported_step
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.records.metrics import read
from phi3_jax.train.settings import Settings, adapter_config
from phi3_jax.train.step import make_train_step, start


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """For all of the file: runs are compared bit for bit, and have to be compiled in one way."""
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run that is finished."""
    settings = write_run(tmp_path_factory.mktemp("six"), steps=6, schedule="constant")
    assert train(settings).step == 6
    return settings


@pytest.fixture
def copied(six: Settings, tmp_path: Path) -> Settings:
    """The same in a folder of its own."""
    shutil.copytree(six.output, tmp_path / "run")
    return dataclasses.replace(six, output=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def ten(six: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run of more steps that nothing interrupted."""
    settings = dataclasses.replace(six, steps=10, output=str(tmp_path_factory.mktemp("ten") / "run"))
    train(settings)
    return settings


def require_equal(settings: Settings, expected: Settings) -> None:
    """The same exports and the same metrics, bit for bit."""
    ours, theirs = Path(settings.output), Path(expected.output)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.glob("adapter*"):
        assert exported_step(ours / path.name) == exported_step(path)
        one, other = tensors(ours / path.name), tensors(path)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert untimed(read(ours / "metrics.jsonl")) == untimed(read(theirs / "metrics.jsonl"))


def test_more_steps_give_the_longer_run(copied, ten):
    longer, heard = dataclasses.replace(copied, steps=10), Heard()
    assert train(longer, heard).step == 10
    assert heard.begun == (6, 10)
    assert "going on after step 6, from the checkpoint of this run" in heard.notes
    require_equal(longer, ten)
    # The table is that of the whole run.
    assert heard.lines[1].split()[:2] == ["before", "0"]
    assert heard.lines[-1].split()[:2] == ["last", "10"]
    records = {record["step"]: record for record in read(Path(longer.output) / "metrics.jsonl")}
    for line in heard.lines[1:]:
        _, step, *values = line.split()
        names = ("eval_loss", "eval_perplexity", "eval_accuracy")
        assert [float(value) for value in values] == pytest.approx(
            [records[int(step)][name] for name in names], rel=1e-4
        )
    written = json.loads((Path(longer.output) / "settings.json").read_text())
    assert (written["settings"]["steps"], written["settings"]["lr"]) == (10, longer.lr)
    assert written["versions"]["jax"] == jax.__version__
    with pytest.raises(ValueError, match=r"^steps=9: the run in .*run has done 10; give at least as many, or name"):
        train(copied := dataclasses.replace(copied, steps=9))
    assert exported_step(Path(copied.output) / "adapter") == 10


def test_a_finished_run_is_not_trained_again_and_what_is_missing_is_written(copied, six):
    folder = Path(copied.output)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("adapter*/*")}
    events = len(list((folder / "tensorboard").iterdir()))
    heard = Heard()
    outcome = train(copied, heard)
    assert (outcome.step, outcome.exported, heard.begun) == (6, folder / "adapter", None)
    assert heard.notes[-1] == "finished before: all 6 steps are done; more steps, or epochs, go on from there"
    assert heard.lines[-1].split()[:2] == ["last", "6"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("adapter*/*")} == before
    assert len(list((folder / "tensorboard").iterdir())) == events
    shutil.rmtree(folder / "adapter")
    train(copied)
    require_equal(copied, six)
    next((folder / "adapter").glob("*.safetensors")).unlink()
    train(copied)
    require_equal(copied, six)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"adapter: from an earlier run, which cannot go on, because"):
        train(copied)


# When a file cannot be read, Orbax leaves others' reading behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_finished_run_whose_state_is_damaged_takes_its_last_steps_again(copied, six):
    folder, heard = Path(copied.output), Heard()
    (folder / "checkpoints" / "6" / "state" / "manifest.ocdbt").unlink()
    shutil.rmtree(folder / "adapter")
    assert train(copied, heard).step == 6
    assert heard.begun == (4, 6)
    assert any(note.startswith("checkpoint 6 cannot be read: ") for note in heard.notes)
    shutil.rmtree(folder / "checkpoints" / "unreadable-6")
    require_equal(copied, six)


def test_a_kill_while_a_finished_run_goes_on(copied, ten, monkeypatch):
    class Killed(BaseException):
        pass

    class Killer(Heard):
        def record(self, record: dict[str, Any]) -> None:
            if record["step"] == 9:
                raise Killed

    longer, adapter = dataclasses.replace(copied, steps=10), Path(copied.output) / "adapter"
    with pytest.raises(Killed):
        train(longer, Killer())
    assert exported_step(adapter) == 6  # the old one, as a whole
    tensors(adapter)

    def killed(new: Path, old: Path) -> bool:
        assert (exported_step(new), old) == (10, adapter)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(exports, "exchange", killed)
        with pytest.raises(Killed):
            train(longer)
    tensors(adapter)  # the old one
    train(longer)
    require_equal(longer, ten)


@pytest.mark.slow
def test_the_rate_is_that_of_the_new_number_of_steps(tmp_path):
    settings = write_run(tmp_path, steps=6, schedule="cosine", eval_file="")
    train(settings)
    longer = dataclasses.replace(settings, steps=10)
    train(longer)

    def rate(updates: int, steps: int) -> float:
        if updates < 2:
            return 1e-2 * (updates + 1) / 3
        return 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (updates - 2) / (steps - 2))))

    rates = [record["lr"] for record in read(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([rate(step, 6 if step < 6 else 10) for step in range(10)], rel=1e-5)
    # Slowly: steps of the one run, and then of the other, without anything between.
    checkpoint = phi3_jax.load(settings.checkpoint)
    assert checkpoint.tokenizer is not None
    data = prepare(settings.train_file, checkpoint.tokenizer, settings, tmp_path / "data")
    state, frozen = start(settings, checkpoint.config, checkpoint.params)
    for number, batch in zip(range(10), batches(data, settings), strict=False):
        jitted: Any = make_train_step(settings if number < 6 else longer, checkpoint.config)
        state, _ = jitted.lower(state, frozen, batch).compile()(state, frozen, batch)
    phi3_jax.checkpoint.save_adapter(
        tmp_path / "slowly", state.trainable, adapter_config(settings), checkpoint.config, ""
    )
    ours, theirs = tensors(tmp_path / "run" / "adapter"), tensors(tmp_path / "slowly")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Held-out losses by the step, to be changed by the test."""
    found: dict[int, float] = {}

    def make(*_: object) -> Callable[[Any], dict[str, Any]]:
        return lambda state: {"eval_loss": found[int(state.step)]}

    monkeypatch.setattr(loop, "make_evaluation", make)
    return found


@pytest.mark.slow
def test_an_early_end(copied, losses, tmp_path):
    """Also in parts; and with more patience it goes on."""
    losses |= dict(enumerate([3.0, 2.0, 2.5, math.nan, 2.0, 1.5, 1.7]))
    settings = dataclasses.replace(copied, output=str(tmp_path / "early"), eval_every=1, save_every=1, patience=3)
    whole, heard = dataclasses.replace(settings, output=str(tmp_path / "whole")), Heard()
    outcome = train(whole, heard)
    assert (outcome.step, outcome.exported) == (4, tmp_path / "whole" / "adapter")
    early, best = heard.notes[-2:]
    assert early == (
        "ended early, after step 4 of 6: patience=3, and the lowest held-out loss is still 2.0000 of step 1; a larger "
        "patience, or 0, goes on"
    )
    assert best.startswith(f"{tmp_path}/whole/adapter-best: of step 1, ")
    assert [line.split()[:3] for line in heard.lines[1:]] == [
        ["before", "0", "3"], ["best", "1", "2"], ["last", "4", "2"],
    ]  # fmt: skip
    for part in (2, 1):
        stopped = Heard(stop_after=part)
        assert train(settings, stopped, stopped.interrupt).exported is None
    assert train(settings).step == 4
    require_equal(settings, whole)
    again = Heard()
    assert train(settings, again).step == 4
    assert (again.begun, again.notes[-1], again.lines) == (None, early, heard.lines)
    shutil.rmtree(tmp_path / "early" / "adapter-best")  # as if the end had been killed before it was written
    train(settings)
    require_equal(settings, whole)
    # More patience: a lower loss comes, and the best is another one.
    assert train(dataclasses.replace(settings, patience=4)).step == 6
    assert exported_step(tmp_path / "early" / "adapter") == 6
    assert exported_step(tmp_path / "early" / "adapter-best") == 5
    losses |= {7: 1.6, 8: 1.4}
    train(dataclasses.replace(settings, patience=0, steps=8))
    assert not (tmp_path / "early" / "adapter-best").exists()  # the last one is the best
    with pytest.raises(ValueError, match=r"^patience=\d: nothing is evaluated; name an eval_file"):
        train(dataclasses.replace(settings, eval_file=""))


@pytest.mark.parametrize(("patience", "last", "parts"), [(1, 3, (2, None, None)), (2, 6, (None,))])
def test_losses_that_are_no_numbers_end_a_run_early_too(six, losses, tmp_path, patience, last, parts):
    """Also a run in parts: the evaluation before the first step has none before it."""
    losses |= dict.fromkeys(range(10), math.nan)
    changes: dict[str, Any] = {"patience": patience, "eval_every": 3, "save_every": 9, "steps": 9}
    settings = dataclasses.replace(six, output=str(tmp_path / "run"), **changes)
    for part in parts:
        heard = Heard(stop_after=part)
        assert train(settings, heard, heard.interrupt).step == (part or last)
    assert heard.notes[-1] == (
        f"ended early, after step {last} of 9: patience={patience}, and no held-out loss is a number; a larger "
        "patience, or 0, goes on"
    )


@pytest.mark.slow
def test_a_best_one_that_is_not_kept(copied, six, losses, tmp_path):
    """It is not written, and does not replace a better one of before whose checkpoint is not there any more."""
    losses |= {9: 1.0, 10: 2.0, 12: 3.0}
    best = Path(copied.output) / "adapter-best"
    for changes in ({"steps": 10}, {"steps": 12, "keep_best": 0}, {"steps": 12, "keep_best": 1}):
        train(dataclasses.replace(copied, **changes))
        assert exported_step(best) == 9
    shutil.copytree(six.output, tmp_path / "none")
    none = dataclasses.replace(six, output=str(tmp_path / "none"), keep_best=0, save_every=1, steps=10)
    train(none)
    assert not (tmp_path / "none" / "adapter-best").exists()


def test_epochs_in_both_directions(copied, ten):
    """20 rows, 4 in a step: 6 steps are 1.2 epochs."""
    with pytest.raises(ValueError, match=r"^epochs=1\.0: that is 5 steps, and the run in .*run has done 6; give at"):
        train(dataclasses.replace(copied, steps=0, epochs=1.0))
    train(longer := dataclasses.replace(copied, steps=0, epochs=2.0))
    require_equal(longer, ten)
    with pytest.raises(ValueError, match=r"^warmup_steps=4: beyond the end of the run, steps=3; lower it, or raise"):
        train(dataclasses.replace(longer, epochs=0.5, warmup_steps=4, output=f"{copied.output}-short"))
    # Fewer rows make fewer steps, but what is to be told is that they are others.
    short = Path(copied.output) / "short.jsonl"
    short.write_text("".join(Path(copied.train_file).read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(ValueError, match=r"not what they were when the run there began are the rows of .*short.jsonl:"):
        train(dataclasses.replace(longer, train_file=str(short)))


def test_what_kills_leave_of_files_is_removed(copied):
    folder = Path(copied.output)
    for name in ("settings.json", "loss.png", ".adapter.new"):
        partial = atomic_write._partial(folder / name)
        partial.mkdir()
        (partial / "new").write_text("half")
    (folder / ".notes.txt-abcdefgh").write_text("of others")
    train(copied)
    assert [path.name for path in folder.glob(".*")] == [".notes.txt-abcdefgh"]


@pytest.mark.slow
def test_other_held_out_data(copied, losses, tmp_path):
    losses |= {3: 0.5, 6: 0.6, 7: 2.0, 8: 3.0}
    settings = dataclasses.replace(copied, output=str(tmp_path / "first"))
    losses[0] = 1.0
    train(settings)
    assert exported_step(tmp_path / "first" / "adapter-best") == 3
    other = dataclasses.replace(
        settings, eval_file=str(write_data(tmp_path / "other.jsonl", 5, 9)), steps=8, eval_every=1
    )
    heard = Heard()
    train(other, heard)
    assert (
        "the held-out rows are others than in the evaluations up to step 6, which are not compared with new ones, "
        "neither for the best nor for patience"
    ) in heard.notes
    assert exported_step(tmp_path / "first" / "adapter-best") == 7
    assert {path.name for path in (tmp_path / "first" / "checkpoints").iterdir()} == {"7", "8"}
    assert [line.split()[:2] for line in heard.lines[1:]] == [["best", "7"], ["last", "8"]]
    # Fewer rows of the same file are other data, too; all of them are not.
    for changes, is_other in (({"eval_rows": 1}, True), ({"eval_rows": 5}, False)):
        heard = Heard()
        train(dataclasses.replace(other, **changes), heard)
        assert any("held-out rows are others" in note for note in heard.notes) == is_other


def other_norm(content: bytes) -> bytes:
    """A file of weights as another program writes it, without our checksums."""
    tensors = safetensors.numpy.load(content)
    return safetensors.numpy.save(tensors | {"model.norm.weight": -tensors["model.norm.weight"]})


@pytest.mark.slow
def test_another_base_of_the_same_name(tmp_path):
    model = tmp_path / "model"
    settings = write_run(tmp_path, steps=1, schedule="constant")
    train(settings)
    (weights,) = model.glob("*.safetensors")
    config, template = model / "config.json", model / "tokenizer_config.json"
    for path, change, told in (
        (weights, other_norm, "the weights of"),
        (
            config,
            lambda content: content.replace(b'"sliding_window": 19', b'"sliding_window": 18'),
            "the configuration",
        ),
        (template, lambda content: content.replace(b"<|end|>", b"<|end|>\\n"), "the tokenizer or chat template of"),
    ):
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before, path
        with pytest.raises(
            ValueError, match=rf"run: not what they were when the run there began are .*{told}.*: go on"
        ):
            train(dataclasses.replace(settings, steps=2))
        path.write_bytes(before)
    assert train(dataclasses.replace(settings, steps=2)).step == 2

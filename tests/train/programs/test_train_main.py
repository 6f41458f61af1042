"""phi3-train as a user runs it: stopped, killed, on a full disk."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from batches import read_only, small_disk
from cache_folders import own_cache
from training_runs import tensors, write_run

from phi3_jax.train.programs import train_main
from phi3_jax.train.run.metrics import TIMES, read
from phi3_jax.train.settings import Settings

STEPS = 12


def arguments(settings: Settings) -> list[str]:
    """What differs from the defaults, as --set."""
    changed = [
        f"{field.name}={getattr(settings, field.name)}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    return [part for each in changed for part in ("--set", each)]


class Program:
    """Runs phi3-train with caches of its own."""

    def __init__(self, folder: Path):
        self.env = {**os.environ, "XDG_CACHE_HOME": own_cache(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *args: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "phi3_jax.train.programs.train_main", "--tell_every", "0", *args]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env, cwd=cwd
        )

    def run(self, *args: str, cwd: Path | None = None) -> tuple[int, str, str]:
        with self.start(*args, cwd=cwd) as process:
            out, err = process.communicate(timeout=240)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run by a recipe that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    settings = dataclasses.replace(write_run(folder), steps=STEPS, output="run")
    (folder / "mine.py").write_text(
        f"from phi3_jax.train.settings import Settings\nSETTINGS = {dataclasses.replace(settings, lr=5.0)!r}\n"
    )
    code, out, err = program.run("--recipe", "mine", "--set", f"lr={settings.lr}", cwd=folder)
    assert code == 0, err
    assert out.startswith(f"run/adapter: {STEPS} steps, ")
    assert out.endswith("; the curve is run/loss.png\n")
    lines = err.splitlines()
    assert all(line.startswith("phi3-train: ") for line in lines), err
    assert [line.split()[2] for line in lines[3:]] == ["0:", "3:", "6:", "9:", "12:"]
    return dataclasses.replace(settings, output=str(folder / "run"))


def require_equal(settings: Settings, expected: Settings) -> None:
    """The same weights and the same metrics, bit for bit."""
    ours, theirs = (tensors(Path(each.output) / "adapter") for each in (settings, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    records = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in read(Path(each.output) / "metrics.jsonl")]
        for each in (settings, expected)
    ]
    assert records[0] == records[1]


def steps_of(settings: Settings) -> set[int]:
    folder = Path(settings.output) / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(program, whole, tmp_path, number):
    settings = dataclasses.replace(whole, output=str(tmp_path / "run"), save_every=1000, eval_every=1000, keep_best=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with program.start(*arguments(settings)) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (step,) = steps_of(settings)
    assert 2 <= step < STEPS
    assert err.splitlines()[-1] == f"phi3-train: stopped after step {step}; the same command goes on from there"
    assert metrics.read_bytes().count(b"\n") == 1 + step
    code, _, err = program.run(*arguments(settings))
    assert code == 0, err
    assert f"phi3-train: going on after step {step}, from the checkpoint of this run" in err.splitlines()
    ours, theirs = (tensors(Path(each.output) / "adapter") for each in (settings, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_eight_devices(program, whole, tmp_path, monkeypatch):
    """Weights spread over them, too; stopped and gone on with."""
    base = dataclasses.replace(whole, batch_size=8, accumulation=1, lora_dropout=0.0, save_every=3)
    one, eight = (dataclasses.replace(base, output=str(tmp_path / name)) for name in ("one", "eight"))
    eight = dataclasses.replace(eight, shard_weights=True)
    parts = dataclasses.replace(eight, output=str(tmp_path / "parts"))
    assert program.run(*arguments(one))[0] == 0
    monkeypatch.setitem(program.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert program.run(*arguments(eight))[0] == 0
    with program.start(*arguments(parts)) as process:
        while process.poll() is None and not steps_of(parts):
            time.sleep(0.002)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    code, _, err = program.run(*arguments(parts))
    assert code == 0, err
    assert "going on after step" in err
    require_equal(parts, eight)
    losses = [
        [record.get("eval_loss") for record in read(Path(each.output) / "metrics.jsonl")] for each in (one, eight)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.slow
def test_kills_at_random_moments(program, whole, tmp_path):
    settings = dataclasses.replace(whole, output=str(tmp_path / "run"), save_every=1, eval_every=2)
    expected = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    begun = time.perf_counter()
    assert program.run(*arguments(expected))[0] == 0
    longest = time.perf_counter() - begun
    rng = random.Random(7)
    furthest = kills = 0
    while kills < 20:
        with program.start(*arguments(settings)) as process:
            # Some in the first seconds, when files are opened and read, most of them among the steps.
            time.sleep(rng.uniform(0.4, 1.0) * longest)
            process.kill()
            _, err = process.communicate()
        if process.returncode == 0:  # it was faster, and begins anew
            require_equal(settings, expected)
            shutil.rmtree(settings.output)
            furthest = 0
            continue
        kills += 1
        assert process.returncode == -signal.SIGKILL, err
        assert "cannot be read" not in err
        # What was reached once is not lost.
        assert max(steps_of(settings), default=0) >= furthest
        furthest = max(steps_of(settings), default=0)
    code, _, err = program.run(*arguments(settings))
    assert code == 0, err
    assert "cannot be read" not in err
    require_equal(settings, expected)
    assert not list(Path(settings.output).glob("checkpoints/unreadable*"))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (None, [], r"^name a --recipe, or at least --set train_file=FILE; see phi3-train --help$"),
        (None, ["nonsense=3"], r"^--set nonsense=3: give name=value, with one of checkpoint, init_adapter, output, "),
        (None, ["lr=high"], r"^lr=high: must be a number$"),
        (None, ["steps=3"], r"^train_file: not given; name a file of JSON lines$"),
        ("empty", [], r"^--recipe empty: module 'empty' has no attribute 'SETTINGS'; name a module with SETTINGS"),
        ("no.where", [], r"^--recipe no\.where: No module named 'no'; name a module with SETTINGS, with dots between$"),
    ],
)
def test_mistakes(recipe, changes, message, tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver(recipe=recipe, set=changes), pytest.raises(ValueError, match=message):
        train_main.main()


def test_a_folder_that_cannot_be_written_is_one_line(program, tmp_path):
    (tmp_path / "fixed").mkdir()
    with read_only(tmp_path / "fixed"):
        code, out, err = program.run("--set", "train_file=a", "--set", f"output={tmp_path}/fixed/run")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"phi3-train: \[Errno \d+\] .*: '.*/fixed/run'\n", err), err


@pytest.mark.slow
def test_a_full_disk(program, whole, tmp_path):
    with small_disk(tmp_path / "disk", 4_000_000) as disk:
        settings = dataclasses.replace(whole, output=str(disk / "run"), save_every=1, keep_last=100)
        code, _, err = program.run(*arguments(settings))
        assert code == 1
        assert err.splitlines()[-1].startswith(
            f"phi3-train: {disk}/run/checkpoints: takes up to 102 more checkpoints"
        ), err
        settings = dataclasses.replace(settings, keep_last=1, keep_best=0)
        with program.start(*arguments(settings)) as process:
            while process.poll() is None and not steps_of(settings):
                time.sleep(0.002)
            (disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free - 500_000))
            _, err = process.communicate(timeout=60)
        *notes, last = err.splitlines()
        assert process.returncode == 1
        assert last.startswith(
            f"phi3-train: {disk}/run/checkpoints: a checkpoint could not be written (it takes 0.0"
        ), err
        assert all(line.startswith("phi3-train: ") for line in notes), err
        (step,) = steps_of(settings)
        (disk / "more").unlink()
        code, _, err = program.run(*arguments(settings))
        assert code == 0, err
        assert f"going on after step {step}," in err
        require_equal(settings, whole)


def test_help_needs_no_extra(program):
    script = (
        "import sys; sys.modules['orbax'] = sys.modules['matplotlib'] = None\n"
        "from phi3_jax.train.programs.train_main import run; run()"
    )
    for args, code, text in (
        (["--help"], 0, "phi3-train: fine-tunes a model"),
        (["--set", "train_file=x"], 1, "phi3-train: training needs more packages ("),
    ):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert (done.stdout + done.stderr).startswith(text)
    assert "pip install 'phi3_jax[train]'" in done.stderr

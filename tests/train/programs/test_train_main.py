"""phi3-train as a user runs it: stopped, killed, on a full disk."""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from batches import read_only, small_disk
from cache_folders import own_cache
from forked_programs import Forked, forked
from training_runs import tensors, write_data, write_run

from phi3_jax.train.programs import train_main
from phi3_jax.train.programs.settings_help import settings_help
from phi3_jax.train.run.records.metrics import TIMES, read
from phi3_jax.train.settings import Settings

STEPS = 12
TELL_ALL = ["--tell_every", "0"]


def arguments(settings: Settings) -> list[str]:
    """What differs from the defaults, as --set."""
    changed = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            told = ",".join(map(str, value)) if isinstance(value, tuple) else value
            changed.append(f"{field.name}={told}")
    return [part for each in changed for part in ("--set", each)]


class Program:
    """Runs phi3-train with caches of its own."""

    def __init__(self, folder: Path):
        self.env = {**os.environ, "XDG_CACHE_HOME": own_cache(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *args: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "phi3_jax.train.programs.train_main", *TELL_ALL, *args]
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
    recipe = dataclasses.replace(settings, lr=0.5, train_file="no")
    (folder / "mine.py").write_text(f"from phi3_jax.train.settings import Settings\nSETTINGS = {recipe!r}\n")
    code, out, err = program.run(settings.train_file, "--recipe", "mine.py", "--set", f"lr={settings.lr}", cwd=folder)
    assert code == 0, err
    assert out.startswith(f"run/adapter: {STEPS} steps, ")
    assert out.endswith("; the curve is run/loss.png\n")
    lines = err.splitlines()
    assert all(line.startswith("phi3-train: ") for line in lines), err
    steps = [line.split()[2] for line in lines if line.startswith("phi3-train: step ")]
    assert steps == ["0:", "3:", "6:", "9:", "12:"]
    assert [line.split()[1] for line in lines[-4:]] == ["held", "before", "best", "last"]
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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_saves_and_ends(program, whole, tmp_path, number, code):
    settings = dataclasses.replace(whole, output=str(tmp_path / "run"), save_every=STEPS, eval_every=STEPS, keep_best=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with program.start(*arguments(settings)) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
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
    assert process.returncode == 128 + signal.SIGTERM, err
    code, _, err = program.run(*arguments(parts))
    assert code == 0, err
    assert "going on after step" in err
    require_equal(parts, eight)
    losses = [
        [record.get("eval_loss") for record in read(Path(each.output) / "metrics.jsonl")] for each in (one, eight)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@contextlib.contextmanager
def forks_of(program: Program, folder: Path) -> Iterator[Forked]:
    """The same program, started in milliseconds instead of seconds."""
    with forked("phi3_jax.train.programs.train_main", folder / "log", program.env["XDG_CACHE_HOME"]) as forks:
        yield forks


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def kill(forks: Forked, number: int) -> int:
    """-> the exit code; 0 of a program that has ended before."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return forks.wait()


@pytest.mark.slow
def test_kills_at_random_moments(program, whole, tmp_path):
    settings = dataclasses.replace(whole, output=str(tmp_path / "run"), save_every=1, eval_every=2)
    expected = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    with forks_of(program, tmp_path) as forks:
        code, err, longest = forks.run(*TELL_ALL, *arguments(expected))
        assert code == 0, err
        rng = random.Random(7)
        furthest = kills = 0
        while kills < 20:
            number = forks.start(*TELL_ALL, *arguments(settings))
            # Some in the first seconds, when files are opened and read, most of them among the steps.
            time.sleep(rng.uniform(0.1, 1.0) * longest)
            code, err = kill(forks, number), (tmp_path / "log").read_text()
            if code == 0:  # it was faster, and begins anew
                require_equal(settings, expected)
                shutil.rmtree(settings.output)
                furthest = 0
                continue
            kills += 1
            assert code == -signal.SIGKILL, err
            assert "cannot be read" not in err
            # What was reached once is not lost.
            assert max(steps_of(settings), default=0) >= furthest
            furthest = max(steps_of(settings), default=0)
        code, err, _ = forks.run(*TELL_ALL, *arguments(settings))
    assert code == 0, err
    assert "cannot be read" not in err
    require_equal(settings, expected)
    assert not list(Path(settings.output).glob("checkpoints/unreadable*"))


@pytest.mark.slow
def test_kills_with_a_mixture_and_epochs(program, whole, tmp_path):
    """Three files of which an epoch has 1/2, 2 and 1.3 times the rows; some lines held out, some cut."""
    others = [str(write_data(tmp_path / f"{seed}.jsonl", lines, seed)) for seed, lines in ((5, 12), (6, 25))]
    settings = dataclasses.replace(
        whole,
        output=str(tmp_path / "run"),
        train_file=(whole.train_file, *others),
        mixture=(0.5, 2.0, 1.3),
        eval_file=(),
        eval_fraction=0.25,
        eval_rows=5,
        steps=0,
        epochs=1.3,
        truncate="left",
        sequence_length=11,
        save_every=1,
        eval_every=2,
    )
    expected = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    with forks_of(program, tmp_path) as forks:
        code, told, longest = forks.run(*TELL_ALL, *arguments(expected))
        assert code == 0, told
        steps = int(re.search(r"adapter: (\d+) steps", told)[1])
        assert f"; {steps} steps of 4 rows = " in told
        assert re.search(r"\d+ lines cut, which lost \d+ tokens", told)
        rng, reached, kills = random.Random(8), set(), 0
        while kills < 3:
            number = forks.start(*TELL_ALL, *arguments(settings))
            before = max(steps_of(settings), default=0)
            while is_alive(number) and max(steps_of(settings), default=0) < min(before + 1, steps - 1):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1) * longest)
            code = kill(forks, number)
            if code == 0:  # it was faster, and begins anew
                require_equal(settings, expected)
                shutil.rmtree(settings.output)
                continue
            kills += 1
            assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
            reached.add(max(steps_of(settings)))
        assert len(reached) > 1
        code, told, _ = forks.run(*TELL_ALL, *arguments(settings))
    assert code == 0, told
    require_equal(settings, expected)


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ([], [], r"^say what to train on: phi3-train chats\.jsonl, or --recipe FILE; phi3-train --help tells more$"),
        ([], ["nonsense=3"], r"^--set nonsense=3: there is no setting nonsense; phi3-train --help lists all$"),
        ([], ["steps=3"], r"^train_file: not given; name a file of JSON lines$"),
        (["a.jsonl", "lr=3"], [], r"^lr=3: write --set lr=3$"),
        (["mine.py"], [], r"^mine\.py: write --recipe mine\.py$"),
        (["a.jsonl"], ["train_file=b.jsonl"], r"^--set train_file=b\.jsonl: train_file is given twice"),
        (["a.jsonl"], ["steps=3"], r"^a\.jsonl: no such file; give one of JSON lines$"),
    ],
)
def test_mistakes(files, changes, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver(set=changes), pytest.raises((ValueError, FileNotFoundError), match=message):
        train_main.main(files)


def test_a_folder_that_cannot_be_written_is_one_line(program, tmp_path):
    (tmp_path / "fixed").mkdir()
    with read_only(tmp_path / "fixed"):
        code, out, err = program.run(*arguments(write_run(tmp_path, output=f"{tmp_path}/fixed/run")))
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


def test_help_and_mistakes_need_no_extra():
    said = (
        ("--help", "phi3-train: fine-tunes a model"),
        ("--lr=3", "phi3-train: there is no --lr; write --set lr=VALUE; see phi3-train --help"),
        (
            "--max_grad_norm 1",
            "phi3-train: there is no --max_grad_norm; write --set clip_norm=VALUE; see phi3-train --help",
        ),
        ("--learning-rate=3", "phi3-train: there is no --learning-rate; write --set lr=VALUE; see phi3-train --help"),
        ("x lr=3", "phi3-train: lr=3: write --set lr=3"),
        (
            "x learning_rate=3",
            "phi3-train: learning_rate=3: no such file; settings are written --set NAME=VALUE; did you ",
        ),
        ("x --recip=y", "phi3-train: there is no --recip; did you mean --recipe?; see phi3-train --help"),
        ("x --zzz", "phi3-train: there is no --zzz; see phi3-train --help"),
        ("x", "phi3-train: training needs more packages ("),
        ("x --set lr=0", "phi3-train: lr=0.0: must be above 0"),
    )
    script = (
        "import sys; sys.modules['orbax'] = sys.modules['matplotlib'] = None\n"
        "from phi3_jax.train.programs.train_main import run\n"
        f"for args in {[args.split() for args, _ in said]}:\n"
        "    sys.argv[1:] = args\n"
        "    try: run()\n"
        "    except SystemExit as end: print(end.code or '')\n"
        "    print('----')\n"
    )
    command = [sys.executable, "-u", "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    for text, (args, begin) in zip(done.stdout.split("\n----\n"), said, strict=False):
        assert text.startswith(begin), (args, text)
    assert "pip install 'phi3_jax[train]'" in done.stdout
    shown = done.stdout.split("\n----\n")[0]
    assert settings_help() in shown
    assert all(len(line) <= 96 for line in shown.splitlines() if "(default: /" not in line)

"""Several processes, kills, and disks that are full."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import (
    SETTINGS,
    answer,
    expected,
    file_size_limit,
    names,
    prompts,
    run,
    small_disk,
    write_slowly,
)

from phi3_jax.infer.serving.batch.answer_file import AnswerFile


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file in a folder where nothing else is."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "answers.jsonl"


@contextlib.contextmanager
def writer(source: Path, target: Path, seconds: float) -> Iterator[tuple[Any, Any]]:
    """A process that runs `write_slowly`, and where it says what it has written; what it imports, it finds imported."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["phi3_jax.infer.serving.batch.requests"])
    reading, writing = forks.Pipe(duplex=False)
    process = forks.Process(target=write_slowly, args=(source, target, seconds, writing))
    process.start()
    writing.close()
    with reading:
        try:
            yield process, reading
        finally:
            process.kill()
            process.join()


def rest(reading: Any) -> list[int]:
    said = []
    with contextlib.suppress(EOFError):
        while True:
            said.append(reading.recv())
    return said


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, out: Path) -> None:
    count, kills, longest = 503, 12, 0.08
    source = tmp_path / "requests.jsonl"
    prompts(tmp_path, count)
    rng = random.Random(3)
    done = 0
    for _ in range(kills):
        with writer(source, out, 0.002) as (process, reading):
            assert reading.recv() == done
            time.sleep(rng.uniform(0, longest))
            process.kill()
            said = rest(reading)
        assert process.exitcode == -signal.SIGKILL
        assert names(out.parent) == {"answers.jsonl.partial"}
        before, done = done, Path(f"{out}.partial").read_bytes().count(b"\n") - 1
        # A write may have happened without a word on it, but not the other way round.
        assert done - max(said, default=before) in (0, 1)
    assert 0 < done < count
    for target in (out, tmp_path / "uninterrupted.jsonl"):
        with writer(source, target, 0.0) as (process, reading):
            assert rest(reading)[-1] == count
            process.join()
        assert process.exitcode == 0
    assert out.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()
    assert out.read_bytes().count(b"\n") == count
    assert names(out.parent) == {"answers.jsonl"}


def test_a_second_process_is_refused_and_a_kill_leaves_no_lock(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 5)
    with writer(tmp_path / "requests.jsonl", out, 1000) as (process, reading):
        assert (reading.recv(), reading.recv()) == (0, 1)
        before = Path(f"{out}.partial").read_bytes()
        with pytest.raises(ValueError, match=r"answers\.jsonl\.partial: another process is writing it"):
            AnswerFile(out, requests, SETTINGS)
        assert Path(f"{out}.partial").read_bytes() == before
        process.kill()
    Path(f"{out}.partial").unlink()
    with AnswerFile(out, requests, SETTINGS):
        with pytest.raises(ValueError, match="another process is writing it"):
            AnswerFile(out, requests, SETTINGS)
        AnswerFile(out.parent / "b.jsonl", requests, SETTINGS).__exit__()
    run(out, requests)
    assert out.read_bytes() == expected(requests)


@pytest.mark.parametrize("finished", [True, False])
def test_the_other_process_ends_between_open_and_lock(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    requests = prompts(tmp_path, 2)
    real, calls = fcntl.flock, 0

    def flock(file: Any, operation: int) -> None:
        nonlocal calls
        if (calls := calls + 1) == 1:
            Path(f"{out}.partial").unlink()
            if finished:
                out.write_text("of the other process")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if finished:
        with pytest.raises(ValueError, match="exists already"):
            AnswerFile(out, requests, SETTINGS)
        assert names(out.parent) == {"answers.jsonl"}
        assert out.read_text() == "of the other process"
    else:
        run(out, requests, stop_at=1)
        assert calls == 2
        assert names(out.parent) == {"answers.jsonl.partial"}


def test_the_partial_file_is_removed_while_it_is_written(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 2)
    with AnswerFile(out, requests, SETTINGS) as first:
        first.write(0, answer(0))
        Path(f"{out}.partial").unlink()
        second = AnswerFile(out, requests, SETTINGS)
        first.write(1, answer(1))
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl", "answers.jsonl.partial"}
    second.__exit__()


# ---- full disks ----


def test_a_write_that_breaks_off(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with file_size_limit(50), pytest.raises(OSError, match=r"make room.*answers\.jsonl\.partial") as caught:
        AnswerFile(out, requests, SETTINGS)
    assert caught.value.errno == errno.EFBIG
    assert names(out.parent) == set()
    with AnswerFile(out, requests, SETTINGS) as answers:
        answers.write(0, answer(0))
        before = partial.read_bytes()
        with file_size_limit(len(before) + 10), pytest.raises(OSError, match=r"make room.*answers\.jsonl\.partial"):
            answers.write(1, answer(1))
        assert (answers.done, partial.read_bytes()) == (1, before)
        answers.write(1, answer(1))
    assert names(out.parent) == {"answers.jsonl.partial"}
    run(out, requests)
    assert out.read_bytes() == expected(requests)


def test_a_full_disk(tmp_path: Path) -> None:
    requests = prompts(tmp_path, 5)
    page = os.sysconf("SC_PAGE_SIZE")
    long = {"text": "é" * (page * 5 // 4)}  # 2.5 pages
    with small_disk(tmp_path / "disk", 8 * page) as disk:
        out = disk / "answers.jsonl"
        partial = Path(f"{out}.partial")

        def write_all(done: int) -> None:
            with AnswerFile(out, requests, SETTINGS) as answers:
                assert answers.done == done
                for index in reversed(answers.missing):
                    answers.write(index, long)

        for done in (0, 3):
            with pytest.raises(OSError, match=r"No space left.*make room.*answers\.jsonl\.partial") as caught:
                write_all(done)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(partial))
            assert partial.read_bytes().count(b"\n") == 1 + 3
            assert partial.read_bytes().endswith(b"\n")
        # Room for all answers, but not for the copy.
        subprocess.run(["mount", "-o", f"remount,size={14 * page}", disk], check=True)
        for done in (3, 5):
            with pytest.raises(OSError, match=r"No space left.*all answers are in .*partial: run the same") as caught:
                write_all(done)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(out))
            assert names(disk) == {"answers.jsonl.partial"}
        subprocess.run(["mount", "-o", f"remount,size={40 * page}", disk], check=True)
        write_all(5)
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert lines == [{**request.fields, **long} for request in requests]
        assert names(disk) == {"answers.jsonl"}


def test_a_kill_between_the_last_two_steps_leaves_nothing_for_long(tmp_path: Path, out: Path) -> None:
    requests, partial = prompts(tmp_path, 3), Path(f"{out}.partial")
    with AnswerFile(out, requests, SETTINGS) as answers:
        for index in (1, 2, 0):
            answers.write(index, answer(index))
        all_lines = partial.read_bytes()
    whole = out.read_bytes()
    shorter = all_lines[: all_lines[:-1].rindex(b"\n") + 1]
    for content in (all_lines, all_lines.replace(b"a1", b"a9"), whole, shorter):  # only the first is of this file
        partial.write_bytes(content)
        with pytest.raises(ValueError, match=r"answers\.jsonl: exists already"):
            AnswerFile(out, requests, SETTINGS)
        assert partial.exists() == (content != all_lines)
        assert out.read_bytes() == whole

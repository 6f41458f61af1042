"""Batches for the tests of requests.py and answer_file.py: requests, answers, disks."""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.infer.sampling import Sampling
from phi3_jax.infer.serving.batch.answer_file import AnswerFile
from phi3_jax.infer.serving.batch.requests import Request, read_requests

SETTINGS = {"checkpoint": "demo", "max_new_tokens": 7, "stop": ["a", "b"]}
PROGRAM = Sampling(temperature=0.5, top_k=11, seed=2**32 - 2)


def read(folder: Path, *lines: str | bytes, sampling: Sampling = PROGRAM) -> list[Request]:
    path = folder / "requests.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return read_requests(path, sampling)


def prompts(folder: Path, count: int) -> list[Request]:
    return read(folder, *(json.dumps({"prompt": f"p{i} é", "id": i}, ensure_ascii=False) for i in range(count)))


def answer(index: int) -> dict[str, Any]:
    return {"text": f"a{index}: \n\u2028 ü 😀", "token_ids": [index, 3], "finish_reason": "stop"}


def run(path: Path, requests: list[Request], settings: Any = SETTINGS, stop_at: int | None = None) -> None:
    with AnswerFile(path, requests, settings) as answers:
        for index in answers.missing[: None if stop_at is None else max(0, stop_at - answers.done)]:
            answers.write(index, answer(index))


def write_slowly(source: Path, target: Path, seconds: float, said: Connection) -> None:
    """Answers all in random order with a pause after each, and says how many are written."""
    requests = read_requests(source, Sampling())
    with AnswerFile(target, requests, SETTINGS) as answers:
        said.send(answers.done)
        for index in random.sample(answers.missing, len(answers.missing)):
            rng = random.Random(index)
            answers.write(index, {"text": rng.choice("aé€😀") * rng.randrange(20_000), "token_ids": [index]})
            said.send(answers.done)
            time.sleep(seconds)


def expected(requests: list[Request]) -> bytes:
    lines = [json.dumps({**r.fields, **answer(i)}, ensure_ascii=False) for i, r in enumerate(requests)]
    return "".join(line + "\n" for line in lines).encode()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files cannot grow beyond it: the write that would gets half of its way, and the next fails (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Root may write to every folder, but not to a disk that is mounted for reading."""
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this root cannot mount")
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)

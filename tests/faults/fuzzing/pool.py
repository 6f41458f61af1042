"""Workers, watched: one that crashes, hangs or eats memory is ended, told of, and replaced by another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

LIMIT = 5.0  # seconds that reading may take
_MAKING = 300.0  # seconds, for valid inputs and what is compiled for them
_ENOUGH = 1.5e9  # bytes beyond what the worker had, with which it is ended


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of an input: see verdicts.py.

    Attributes:
      place, file, kind, detail: of the mutation.
      where: in the code an exception came from.
    """

    reader: str
    seed: int
    verdict: str
    why: str = ""
    place: str = ""
    file: str = ""
    kind: str = ""
    detail: str = ""
    seconds: float = 0
    memory: float = 0
    message: str = ""
    trace: str = ""

    @property
    def where(self) -> str:
        """The line of ours that raised, or nothing."""
        lines = [line.strip() for line in self.trace.splitlines() if line.strip().startswith("File ")]
        ours = [line for line in lines if any(f"/{each}/" in line for each in ("phi3_jax", "infer", "train"))] or lines
        if not ours:
            return ""
        file, number, function = ours[-1].split(", ", 2)
        path = "/".join(file.split('"')[1].split("/")[-3:])
        return f"{path}:{number.split()[1]} {function}"


def run(
    command: Sequence[str],
    jobs: Iterable[tuple[str, int]],
    workers: int,
    work: Path,
    tell: Callable[[Result], None],
    keep: Callable[[Result], Path | None] = lambda result: None,
    limit: float = LIMIT,
) -> None:
    """Runs the jobs, (reader, seed), in worker processes.

    Args:
      command: starts a worker.
      tell: is called with each result, by one thread at a time.
      keep: where the input of a result is kept, if it is.
      limit: seconds that reading may take.
    """
    todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    lock, failures = threading.Lock(), list[BaseException]()

    def serve() -> None:
        worker = _Worker(command, work, limit)
        try:
            while not failures:
                try:
                    reader, seed = todo.get_nowait()
                except queue.Empty:
                    return
                result = worker.ask(reader, seed)
                if result.verdict == "hang":  # perhaps the machine was busy: once more
                    result = worker.ask(reader, seed)
                with lock:
                    if (kept := keep(result)) is not None:
                        shutil.rmtree(kept, ignore_errors=True)
                        shutil.move(worker.case(reader, seed), kept)
                    tell(result)
                shutil.rmtree(worker.case(reader, seed), ignore_errors=True)
        except BaseException as error:
            failures.append(error)
        finally:
            worker.end()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # so that Ctrl-C is heard
            thread.join(0.2)
    if failures:
        raise failures[0]


class _Worker:
    def __init__(self, command: Sequence[str], work: Path, limit: float):
        self._command, self._work, self._limit = command, work, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def case(self, reader: str, seed: int) -> Path:
        return self._work / "cases" / f"{reader}-{seed}"

    def ask(self, reader: str, seed: int) -> Result:
        case = self.case(reader, seed)
        shutil.rmtree(case, ignore_errors=True)
        case.parent.mkdir(parents=True, exist_ok=True)
        if self._process is None:
            self._unread = b""
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        assert self._process.stdin is not None
        question = {"reader": reader, "seed": seed, "case": str(case)}
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        found = self._line(_MAKING, 8e9)
        if isinstance(found, str):
            raise RuntimeError(f"{reader}, seed {seed}: the valid input could not be made or read ({found})")
        mutation = found["mutation"]
        answer = self._line(max(self._limit, found["seconds"]), _ENOUGH)
        if isinstance(answer, dict) and self._more > found["memory"]:  # of processes that it has started
            answer["verdict"], answer["why"] = "memory", f"{self._more / 1e6:.0f} MB"
        if isinstance(answer, str):
            verdict, why = answer.split(": ", 1)
            return Result(reader, seed, verdict, why, **mutation, seconds=self._seconds, memory=self._more)
        told, memory = answer["outcome"], max(answer["outcome"]["memory"], self._more)
        texts = {name: told[name] for name in ("seconds", "message", "trace")}
        return Result(reader, seed, answer["verdict"], answer["why"], **mutation, **texts, memory=memory)

    def _line(self, limit: float, memory: float) -> dict[str, Any] | str:
        """The next answer; or why there is none, and then the process is no more."""
        assert self._process is not None
        assert self._process.stdout is not None
        output, begin, waited, had = self._process.stdout, time.monotonic(), self._waited(), self._memory()
        self._seconds = self._more = 0.0
        while b"\n" not in self._unread:
            if select.select([output], [], [], 0.05)[0]:
                got = os.read(output.fileno(), 1 << 20)
                if not got:
                    status = self._ended()
                    return f"crash: {signal.Signals(-status).name if status < 0 else f'exit code {status}'}"
                self._unread += got
                continue
            self._seconds = time.monotonic() - begin - (self._waited() - waited)
            self._more = max(self._more, self._memory() - had)
            if self._seconds > limit:
                self.end()
                return f"hang: not read after {self._seconds:.1f} s"
            if self._more > memory:
                self.end()
                return f"memory: {self._more / 1e6:.0f} MB and more"
        line, self._unread = self._unread.split(b"\n", 1)
        return dict(json.loads(line))

    def _waited(self) -> float:
        """Seconds for which the process was ready, but others had the processor."""
        assert self._process is not None
        try:
            return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def _memory(self) -> float:
        """Bytes of the process and of those that it has started."""
        assert self._process is not None
        pages, processes = 0, [self._process.pid]
        while processes:
            place = Path(f"/proc/{processes.pop()}")
            with contextlib.suppress(OSError, IndexError):
                pages += int((place / "statm").read_text().split()[1])
                processes += map(int, (place / "task" / place.name / "children").read_text().split())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._ended()

    def _ended(self) -> int:
        """The exit code."""
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        status, self._process = self._process.wait(), None
        return status

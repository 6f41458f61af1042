"""The processes that phi3-benchmark measures: ours, and the peers', which may run in another Python."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

_LAST_LINES = 5  # of the output of a process that failed
_SECONDS_TO_END = 10


class Process:
    """A process that answers requests (peer_process.py tells how), until `close`."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Starts it. Raises FileNotFoundError if there is no such program."""
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            # A process group of its own: Ctrl-C ends it through us.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                encoding="utf-8",
                process_group=0,
            )
        except OSError:
            self._said.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply. Raises ValueError if it is an error, or the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"{self.name} ended with exit code {self._process.wait()}: {self._last_said()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ValueError(f"{self.name}: {reply['error']}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends it; after an error or Ctrl-C without waiting for what it does."""
        if kind is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _last_said(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return " / ".join(lines[-_LAST_LINES:]) or "it said nothing"


@contextlib.contextmanager
def ours(name: str = "phi3_jax") -> Iterator[Process]:
    """Our own process (ours.py), in this Python."""
    with Process(name, [sys.executable, "-m", "phi3_jax.infer.benchmark.ours"]) as process:
        yield process


@contextlib.contextmanager
def peer(name: str, program: str, python: str | None) -> Iterator[Process]:
    """A peer's process; program is "llama_cpp" or "transformers", python another Python's path."""
    # -P: or the modules beside the script would hide others of the same names.
    script = str(Path(__file__).with_name("peer_process.py"))
    with Process(name, [python or sys.executable, "-P", script, program]) as process:
        yield process

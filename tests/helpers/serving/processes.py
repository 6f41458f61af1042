"""phi3-serve, and other servers, as processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_START = "import sys, phi3_start; sys.argv[0] = 'phi3-serve'; phi3_start.serve()"


@dataclasses.dataclass
class Server:
    """A server that runs.

    Attributes:
      url: where it listens.
      process: its process.
      log: what it prints.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> tuple[int, bytes]:
        """The status and the body; 0 if nobody listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def metrics(self) -> dict[str, float]:
        """The values of /metrics, by name with labels."""
        status, text = self.get("/metrics")
        assert status == 200, text
        lines = [line.rpartition(" ") for line in text.decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def memory(self) -> int:
        """Bytes of its memory that are not files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    def last_words(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, ready: str, seconds: float = 1800, **more: str) -> Iterator[Server]:
    """Inside, a server answers 200 to the path `ready`; at the end it is told to end, and has to.

    Args:
      more: of its environment.

    Raises:
      RuntimeError: it ended before, or was not ready in time.
    """
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **more}
        )
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            end = time.monotonic() + seconds
            while server.get(ready)[0] != 200:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} is not ready ({process.poll()}):\n{server.last_words()}")
                time.sleep(0.1)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def phi3_serve(*arguments: str, **more: str) -> Iterator[Server]:
    """Our program, ready; see `running`."""
    port = free_port()
    command = [sys.executable, "-c", _START, f"--port={port}", *arguments]
    with running(command, port, "/ready", **more) as server:
        yield server


def free_port() -> int:
    """A port at which nobody listens now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def models(server: Server) -> list[str]:
    """The names that requests may use."""
    return [each["id"] for each in json.loads(server.get("/v1/models")[1])["data"]]

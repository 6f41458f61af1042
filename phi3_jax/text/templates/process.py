"""Runs chat templates in a process of their own, with bounds on time and memory that no template can get around.

jinja2's sandbox bounds what a template may touch, and not how long it takes or how much it holds: `~` in a loop doubles
a text until the memory is gone, and nested loops have no end. So `sandbox` runs in a small process, `worker`, that is
started at the first use and kept, one for each of ours. The system ends it when it has used its processor time or its
address space (macOS does not hold the second of these), and the next request starts another one.

A request is a length and limits, then JSON: {"function": its name in `sandbox`, and arguments}. A reply is a length,
then {"result": ...} or {"failed": why}. Both go through one socket; the process ends when it is closed.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from phi3_jax.text.templates.worker import HEADER, LENGTH, OUT_OF_MEMORY

# What a request may take. Messages of 5 MB, copied some ten times at four bytes a character, get what they need.
_SECONDS, _SECONDS_PER_MB = 1.0, 1.0  # of processor time: another program's load does not count
_MEMORY, _MEMORY_PER_BYTE = 150_000_000, 40
_PATIENCE = 60  # the same in time on the clock, for a process that neither works nor ends
_TO_START = 60.0
_TIDY = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc then gives long texts back at once, and the next request has room


@dataclass(frozen=True)
class Vocabulary:
    """What a template speaks of.

    Attributes:
        variables: names that it takes from outside.
        fields: names of fields that it may read, from messages or from anything else.
        compared: texts that it compares something with, among them the roles that it knows by name.
        writes_json: whether it has a use of the filter `tojson`.
    """

    variables: frozenset[str]
    fields: frozenset[str]
    compared: frozenset[str]
    writes_json: bool


def run(source: str, variables: dict[str, Any], characters: int, palettes: Sequence[Any] = ()) -> list[str]:
    """What a template writes: `sandbox.run` with these arguments, all of them JSON's types.

    Raises:
        ValueError: the template fails, refuses the messages, or takes too much time or memory.
        OSError: there is no process to run it in.
    """
    texts: list[str] = _ask("run", source=source, variables=variables, characters=characters, palettes=palettes)
    return texts


@lru_cache(maxsize=8)
def vocabulary(source: str) -> Vocabulary:
    """What a template speaks of. Raises as `run`, among others for a syntax error."""
    said = _ask("vocabulary", source=source)
    return Vocabulary(
        variables=frozenset(said["variables"]),
        fields=frozenset(said["fields"]),
        compared=frozenset(said["compared"]),
        writes_json=said["writes_json"],
    )


def pid() -> int | None:
    """The number of the process, if one is there."""
    return None if _process is None else _process.pid


def end() -> None:
    """Ends the process; the next request starts another one."""
    global _process
    with _lock:
        if _process is not None:
            _process.end()
            _process = None


def words(source: str) -> str:
    """What a template itself may write: its text and its string constants, U+0000 between them. Raises as `run`."""
    said: str = _ask("words", source=source)
    return said


class _Process:
    """The process and our end of the socket."""

    def __init__(self) -> None:
        """Starts it. Raises OSError if that cannot be."""
        if os.name != "posix" or not sys.executable or hasattr(sys, "frozen"):  # then it is the program itself
            raise OSError("they need Linux or macOS, and an interpreter at sys.executable")
        # Where standard input, output or errors are closed, the socket must not get their numbers: others write there.
        fillers = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
        self._socket, theirs = socket.socketpair()
        for filler in fillers:
            os.close(filler)
        os.set_blocking(theirs.fileno(), True)  # which it is not after socket.setdefaulttimeout
        try:
            with theirs:
                # Without `site`, which takes most of the time: it gets our sys.path.
                flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
                self._process = subprocess.Popen(
                    [sys.executable, *flags, str(Path(__file__).with_name("worker.py"))],
                    env=os.environ | _TIDY,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # which Ctrl-C does not reach
                )
        except BaseException:
            self._socket.close()
            raise
        try:
            path = [folder for folder in sys.path if isinstance(folder, str)]  # as Python's own import takes it
            said = self.ask(json.dumps(path).encode(), _TO_START)
            if "failed" in said:
                raise OSError(f"{said['failed']}; install phi3_jax with what it needs")
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether it is gone, as after `kill -9`."""
        return self._process.poll() is not None

    def ask(self, request: bytes, patience: float, seconds: float = 0, memory: int = 0) -> dict[str, Any]:
        """The reply. Raises OSError if it ends without one: a TimeoutError if it does not even end."""
        self._socket.settimeout(patience)
        self._socket.sendall(HEADER.pack(len(request), seconds, memory) + request)
        (length,) = LENGTH.unpack(self._receive(LENGTH.size))
        reply: dict[str, Any] = json.loads(self._receive(length).decode("utf-8", "surrogatepass"))
        return reply

    def _receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            chunk = self._socket.recv(min(count - len(received), 1 << 20))
            if not chunk:
                raise ConnectionError("it has ended")
            received += chunk
        return bytes(received)

    def end(self, wait: float = 0) -> int:
        """Ends it, unless it does so by itself in the time; the exit status, minus the number of a signal."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if wait:
                self._process.wait(wait)
        self._process.kill()
        return self._process.wait()

    def forget(self) -> None:
        """For a fork of the program that started it: leaves it to that."""
        self._socket.close()
        self._process.returncode = 0  # else Popen would wait for what is no child of the fork's


def _start() -> _Process:
    try:
        return _Process()
    except OSError as error:
        raise OSError(f"the process that runs chat templates cannot be started: {error}.") from error


_lock = threading.Lock()
_process: _Process | None = None


def _ask(function: str, **arguments: Any) -> Any:
    global _process
    try:
        request = json.dumps({"function": function, **arguments}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; what is nested too deeply
        raise ValueError(f"the messages cannot be given to the chat template: {error}") from error
    seconds = _SECONDS + _SECONDS_PER_MB * len(request) / 1e6
    memory = _MEMORY + _MEMORY_PER_BYTE * len(request)
    with _lock:
        for attempt in range(2):
            if _process is None or _process.has_ended():
                _process = _start()
            try:
                reply = _process.ask(request, _PATIENCE * seconds, seconds, memory)
                break
            except OSError as error:
                is_stuck = isinstance(error, TimeoutError)
                status, _process = _process.end(wait=0 if is_stuck else 1), None
                if status == -signal.SIGKILL and not is_stuck and attempt == 0:
                    continue  # somebody else has ended it, for other reasons than what it did
                raise ValueError(_why(status, is_stuck, seconds, memory)) from None
            except BaseException:  # Ctrl-C: the reply that is still to come would be taken for the next one's
                _process.end()
                _process = None
                raise
    if "failed" in reply:
        raise ValueError(reply["failed"])
    return reply["result"]


def _why(status: int, is_stuck: bool, seconds: float, memory: int) -> str:
    remedy = "use another template (chat_template.jinja beside the tokenizer), or shorter messages."
    if is_stuck:
        return f"the chat template has not ended after {_PATIENCE * seconds:.0f} s; {remedy}"
    if status == 0:  # where SIGCHLD is ignored, or others wait for every process, nobody can know it
        most = f"{seconds:.1f} s or {memory / 1e6:.0f} MB of memory"
        return f"the chat template takes more than {most} on these messages; {remedy}"
    if status == -signal.SIGPROF:
        return f"the chat template takes more than {seconds:.1f} s on these messages, perhaps without an end; {remedy}"
    if status == OUT_OF_MEMORY:
        return f"the chat template takes more than {memory / 1e6:.0f} MB of memory on these messages; {remedy}"
    return f"the chat template ends the process that runs it (exit status {status}); {remedy}"


def _forget() -> None:
    global _process, _lock
    _lock = threading.Lock()  # another thread may have held it
    if _process is not None:
        _process.forget()
        _process = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
atexit.register(end)

"""Standard output and standard error that wait, that fail once, and that tell why."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from typing import Any, ClassVar, TextIO

from .interrupts import ask

_STANDARD_OUTPUT = 1


class CannotWriteError(OSError):
    """Standard output cannot be written to."""

    def __str__(self) -> str:
        return f"cannot write to standard output: {super().__str__()}"


class Output(io.FileIO):
    """The file behind a standard stream.

    If nobody reads it any more, the program is asked to end as by SIGPIPE. Other errors of standard output are raised;
    those of standard error could be told nowhere. After the first one nothing is written.

    Attributes:
      failure: that error of standard output, also if somebody has caught it.
    """

    failure: ClassVar[CannotWriteError | None] = None

    def __init__(self, number: int):
        """Writes to a file descriptor, 1 or 2."""
        super().__init__(number, "w", closefd=False)
        self._is_broken = False

    def write(self, data: Any, /) -> int:
        """Writes, and waits where the other end is slow, even if that is not to be waited for."""
        if self._is_broken:
            return len(data)
        try:
            while (written := super().write(data)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self._is_broken = True
            if error.errno == errno.EPIPE:
                ask(signal.SIGPIPE)
            elif self.fileno() == _STANDARD_OUTPUT:
                Output.failure = CannotWriteError(error.errno, error.strerror)
                raise Output.failure from None
            return len(data)


def prepare() -> None:
    """Puts `Output` behind sys.stdout and sys.stderr, and waits for standard input, as Python's readers have to."""
    os.set_blocking(0, True)
    sys.stdout, sys.stderr = _opened(sys.stdout, _STANDARD_OUTPUT), _opened(sys.stderr, 2)


def flush() -> None:
    """Writes what is left. Raises CannotWriteError, also for what was printed before."""
    sys.stdout.flush()
    if Output.failure is not None:
        raise Output.failure


def _opened(stream: TextIO, number: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(Output(number)),
        encoding=stream.encoding,
        errors="replace",  # a terminal that lacks a character shows a question mark
        line_buffering=stream.line_buffering or stream.write_through,
    )

"""The answers to a file of prompts: JSON lines in, JSON lines out, and an interrupted run can be resumed.

    answers.jsonl.partial   header, answer 1, answer 2, ...     while the run goes on
    answers.jsonl           answer 1, answer 2, ..., answer n   when it is over

An answer is one write to the operating system, which survives a kill of the process. A kill can leave half a line at
the end, which the next run drops.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

from phi3_jax.checkpoint.atomic_write import rename_new
from phi3_jax.regular_file import require_regular

from .requests import FORMS, Request, parse_object

_HEADER_BEGIN = b'{"phi3_jax_batch": '
_VERSION = 1


class AnswerFile:
    """Writes the answers of a batch; a context manager.

    If all answers are written when the `with` block ends, for whatever reason, the file gets its final name. Otherwise
    the partial file stays, and a later run with the same arguments goes on at `requests[done]`.

    Attributes:
      done: how many requests have their answers, those of an earlier run included.
      failed: how many of these have an "error".
    """

    def __init__(self, path: str | os.PathLike[str], requests: Sequence[Request], settings: Mapping[str, Any]):
        """Opens the partial file, and locks it for as long as this object is open.

        Args:
          path: the final file; it must not exist.
          settings: what else the answers depend on; only a run with the same settings may go on. Must be JSON.

        Raises:
          FileNotFoundError: there is no such folder.
          OSError: the folder or the partial file cannot be written to, or the disk is full.
          ValueError: the file exists, another process is writing it, or the partial file is none, or not of this batch.
        """
        self._path, self._partial = Path(path), Path(f"{Path(path)}.partial")
        self._requests = requests
        self.done = self.failed = 0
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"{self._path}: there is no folder {self._path.parent}; make it first")
        if not os.access(self._path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{self._path}: the folder cannot be written to; choose another one")
        self._file = self._open_locked()
        try:
            if self._is_finished():
                self._partial.unlink()
            self._refuse_existing()  # not before it is locked: another process may be about to finish it
            self._resume(json.loads(json.dumps(dict(settings), allow_nan=False)))
        except BaseException:
            with self._file:
                if os.fstat(self._file.fileno()).st_size == 0:
                    self._partial.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:  # closing it unlocks it
            if self.done == len(self._requests):
                self._finish()

    def write(self, answer: Mapping[str, Any]) -> None:
        """Appends the answer of `requests[done]`, as {**its fields, **answer}.

        When this returns, the answer survives a kill of the process (not a power cut). When it raises, this answer has
        not been written, and earlier ones are kept.

        Raises:
          OSError: the disk is full, for example.
          ValueError: there are no more requests, or the answer cannot be written: it has a key of a request, or a
            number such as NaN that JSON does not know.
        """
        if self.done == len(self._requests):
            raise ValueError(f"{self._path}: all {self.done} requests have their answers")
        if taken := sorted(answer.keys() & FORMS.keys()):
            raise ValueError(f"{self._path}: the answer has {taken}, which are keys of requests; rename them")
        self._append({**self._requests[self.done].fields, **answer})
        self.done += 1
        self.failed += "error" in answer

    def _is_finished(self) -> bool:
        """Whether a kill came between the last two steps: the final file has the answers, and the partial one, too."""
        if not self._path.is_file():
            return False
        with open(self._path, "rb") as final, open(self._partial, "rb") as partial:
            header = partial.readline()
            if not header.startswith(_HEADER_BEGIN):
                return False
            if os.fstat(partial.fileno()).st_size - len(header) != os.fstat(final.fileno()).st_size:
                return False
            return all(line == other for line, other in zip(final, partial, strict=True))

    def _refuse_existing(self) -> None:
        if os.path.lexists(self._path):
            raise ValueError(f"{self._path}: exists already; choose another name or delete it")

    def _open_locked(self) -> FileIO:
        """Opens or creates the partial file. The kernel drops the lock when the process ends, even by a kill."""
        while True:
            with (
                _explained(self._partial, "choose an output on a disk that takes files, and locks on them"),
                contextlib.ExitStack() as stack,
            ):
                if self._partial.exists() and not self._partial.is_dir():  # opening a folder says so itself
                    require_regular(self._partial)
                file = stack.enter_context(open(self._partial, "a+b", buffering=0))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"{self._partial}: another process is writing it; wait for that, or choose another output"
                    ) from None
                # The process before us may have finished, and removed the file, between the open and the lock.
                if self._is_at_its_place(file):
                    stack.pop_all()  # it stays open
                    return file

    def _is_at_its_place(self, file: FileIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._partial))
        except FileNotFoundError:
            return False

    def _resume(self, settings: dict[str, Any]) -> None:
        """Counts the answers that the partial file holds; writes the header if it is empty."""
        header = {"phi3_jax_batch": _VERSION, "settings": settings, "requests_sha256": _digest(self._requests)}
        self._end = self._header_end = 0
        with open(self._partial, "rb") as lines:
            for line in lines:
                if self._end == 0:
                    self._check_header(line, header)
                if not line.endswith(b"\n"):  # cut off by a kill
                    break
                if self._end == 0:
                    self._header_end = len(line)
                else:
                    self.failed += "error" in self._checked_answer(line)
                    self.done += 1
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end == 0:
            self._append(header)
            self._header_end = self._end

    def _check_header(self, line: bytes, header: Mapping[str, Any]) -> None:
        """Refuses files of other batches, and files that this class did not write; half a header passes."""
        if line[: len(_HEADER_BEGIN)] != _HEADER_BEGIN[: len(line)]:
            raise ValueError(f"{self._partial}: not the beginning of a batch; delete it or choose another output")
        if not line.endswith(b"\n"):
            return
        old = _parsed(line)
        if old.keys() != header.keys() or old["phi3_jax_batch"] != _VERSION or not isinstance(old["settings"], dict):
            raise ValueError(
                f"{self._partial}: its header is damaged, or of another version of phi3_jax; delete it to begin again"
            )
        was, is_ = ({name: json.dumps(x, sort_keys=True) for name, x in h["settings"].items()} for h in (old, header))
        names = [name for name in sorted(was.keys() | is_.keys()) if was.get(name) != is_.get(name)]
        told = [[each.get(name, "absent")[:200] for each in (was, is_)] for name in names]
        if changed := [
            f"{name[:40]} was {there} and is {here}" for name, (there, here) in zip(names, told, strict=True)
        ]:
            raise ValueError(
                f"{self._partial}: begun with other settings: {'; '.join(changed)}. Use the same flags to go on, or "
                "delete the file to begin again"
            )
        if old["requests_sha256"] != header["requests_sha256"]:
            raise ValueError(
                f"{self._partial}: begun with other requests, or with other sampling for them. Use the same input and "
                "flags to go on, or delete the file to begin again"
            )

    def _checked_answer(self, line: bytes) -> dict[str, Any]:
        """The answer in a line; refuses one that is not that of `requests[done]`."""
        answer = _parsed(line)
        if self.done == len(self._requests) or not answer.items() >= self._requests[self.done].fields.items():
            raise ValueError(f"{self._partial}: line {self.done + 2} is damaged; delete the file to begin again")
        return answer

    def _append(self, value: Mapping[str, Any]) -> None:
        """Writes one line, or nothing."""
        try:
            line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except ValueError as error:  # NaN, half a surrogate pair
            raise ValueError(f"{self._partial}: line {self.done + 2} cannot be written: {error}") from None
        with _explained(self._partial, "what it holds is kept: make room, and run the same command to go on"):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except BaseException:
                self._file.truncate(self._end)
                raise
        self._end += len(line)

    def _finish(self) -> None:
        """Writes the answers, without the header, to the final file, atomically."""
        # A fixed name, which the lock protects, so that kills do not leave many copies.
        copy = Path(f"{self._partial}.copy")
        with _explained(self._path, f"all answers are in {self._partial}: run the same command to finish"):
            try:
                with open(copy, "wb") as target:
                    self._file.seek(self._header_end)
                    shutil.copyfileobj(self._file, target)
                    target.flush()
                    os.fsync(target.fileno())
                self._refuse_existing()
                rename_new(copy, self._path)
            finally:
                copy.unlink(missing_ok=True)
            if self._is_at_its_place(self._file):
                self._partial.unlink()


@contextlib.contextmanager
def _explained(file: Path, remedy: str) -> Iterator[None]:
    """Adds the file and the remedy to OSErrors; their class and errno stay."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {remedy}", str(file)) from error


def _digest(requests: Sequence[Request]) -> str:
    """The SHA-256 of the requests, with what the program adds to them."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps([request.fields, request.max_new_tokens, repr(request.sampling)]).encode() + b"\n")
    return digest.hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of a partial file; {} if it is damaged, because no header or answer is empty."""
    with contextlib.suppress(ValueError):
        return parse_object(line)
    return {}

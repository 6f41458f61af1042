"""The answers to a file of requests: JSON lines in, JSON lines out, and an interrupted run can be resumed.

    answers.jsonl.partial   header, {"index": 3, "answer": ...}, {"index": 0, ...}   while the run goes on: as they end
    answers.jsonl           answer 0, answer 1, ..., answer n - 1                    when it is over: in order

An answer is one write to the operating system, which survives a kill of the process. A kill can leave half a line at
the end, which the next run drops.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from phi3_jax.checkpoint.atomic_write import rename_new
from phi3_jax.regular_file import require_regular

from .json_lines import parse_object

_HEADER_BEGIN = b'{"phi3_jax_batch": '
_VERSION = 2  # 1: answers were written in order, without their index
_LINE = re.compile(rb'\{"index": (0|[1-9][0-9]{0,11}), "answer": (.*)\}\n', re.DOTALL)


class Answered(Protocol):
    """A request, as far as a file of answers knows it."""

    @property
    def kept(self) -> Mapping[str, Any]:
        """The fields that its answer repeats."""

    @property
    def identity(self) -> Any:
        """All that its answer depends on beside the settings, as JSON."""

    @property
    def keys(self) -> frozenset[str]:
        """The fields that an answer must not have, because requests may."""


class AnswerFile:
    """Writes the answers of a batch, in any order; a context manager.

    If all answers are written when the `with` block ends, for whatever reason, the file gets its final name. Otherwise
    the partial file stays, and a later run with the same arguments goes on with the requests that are `missing`.

    Attributes:
      failed: how many of the answers tell of an error.
    """

    def __init__(self, path: str | os.PathLike[str], requests: Sequence[Answered], settings: Mapping[str, Any]):
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
        self._places: dict[int, tuple[int, int]] = {}  # of the answers in the partial file: where, how many bytes
        self.failed = 0
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

    @property
    def done(self) -> int:
        """How many requests have their answers, those of an earlier run included."""
        return len(self._places)

    @property
    def missing(self) -> list[int]:
        """The indices of the requests without an answer, rising."""
        return [index for index in range(len(self._requests)) if index not in self._places]

    def write(self, index: int, answer: Mapping[str, Any]) -> None:
        """Appends the answer of `requests[index]`, as {**what is kept of it, **answer}.

        When this returns, the answer survives a kill of the process (not a power cut). When it raises, this answer has
        not been written, and earlier ones are kept.

        Raises:
          OSError: the disk is full, for example.
          ValueError: the request has its answer, or there is no such request, or the answer cannot be written: it has
            a key of a request, or a number such as NaN that JSON does not know.
        """
        if index in self._places or not 0 <= index < len(self._requests):
            raise ValueError(f"{self._path}: request {index} of {len(self._requests)} has its answer, or is none")
        request = self._requests[index]
        if taken := sorted(answer.keys() & request.keys):
            raise ValueError(f"{self._path}: the answer has {taken}, which are keys of requests; rename them")
        begin, length = self._end, self._append({"index": index, "answer": {**request.kept, **answer}})
        self._places[index] = _place(begin, length, index)
        self.failed += has_failed(answer)

    def _is_finished(self) -> bool:
        """Whether a kill came between the last two steps: the final file has the answers, and the partial one, too."""
        if not self._path.is_file():
            return False
        with open(self._path, "rb") as final, open(self._partial, "rb") as partial:
            if not partial.readline().startswith(_HEADER_BEGIN):
                return False
            places: dict[int, tuple[int, int]] = {}
            begin = partial.tell()
            for line in partial:
                if not (match := _LINE.fullmatch(line)):
                    return False
                places[int(match[1])] = _place(begin, len(line), int(match[1]))
                begin += len(line)
            if sorted(places) != list(range(len(places))):
                return False
            return all(
                line == other for line, other in itertools.zip_longest(final, _in_order(partial, places), fillvalue=b"")
            )

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
        self._end = 0
        with open(self._partial, "rb") as lines:
            for line in lines:
                if self._end == 0:
                    self._check_header(line, header)
                if not line.endswith(b"\n"):  # cut off by a kill
                    break
                if self._end > 0:
                    self._check_answer(line)
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end == 0:
            self._append(header)

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

    def _check_answer(self, line: bytes) -> None:
        """Notes the answer in a line; refuses one that is not that of a request, or comes a second time."""
        match = _LINE.fullmatch(line)
        index, answer = (int(match[1]), _parsed(match[2])) if match else (-1, {})
        is_ours = 0 <= index < len(self._requests) and index not in self._places
        if not is_ours or not answer or not answer.items() >= self._requests[index].kept.items():
            raise ValueError(f"{self._partial}: line {self.done + 2} is damaged; delete the file to begin again")
        self._places[index] = _place(self._end, len(line), index)
        self.failed += has_failed(answer)

    def _append(self, value: Mapping[str, Any]) -> int:
        """Writes one line, or nothing -> its length in bytes."""
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
        return len(line)

    def _finish(self) -> None:
        """Writes the answers, in order, to the final file, atomically."""
        # A fixed name, which the lock protects, so that kills do not leave many copies.
        copy = Path(f"{self._partial}.copy")
        with _explained(self._path, f"all answers are in {self._partial}: run the same command to finish"):
            try:
                with open(copy, "wb") as target, open(self._file.fileno(), "rb", closefd=False) as source:
                    target.writelines(_in_order(source, self._places))
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


def has_failed(answer: Mapping[str, Any]) -> bool:
    """Whether an answer tells of an error: in ours, or in that of OpenAI's form."""
    response = answer.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return answer.get("error") is not None or status not in (None, 200)


def check_finished(path: Path, requests: Sequence[Answered]) -> int:
    """Compares a finished file with its requests -> how many of its answers tell of an error.

    Raises:
      ValueError: it does not hold an answer to each.
    """
    failed = count = 0
    with open(path, "rb") as lines:
        for line in lines:
            answer = _parsed(line)
            if count == len(requests) or not answer or not answer.items() >= requests[count].kept.items():
                break
            failed, count = failed + has_failed(answer), count + 1
        else:
            if count == len(requests):
                return failed
    raise ValueError(
        f"{path}: exists already, and line {count + 1} is not the answer to request {count + 1}; delete it, or choose "
        "another output"
    )


def _place(begin: int, length: int, index: int) -> tuple[int, int]:
    """Where in its line of the partial file an answer stands, and its bytes: `_LINE` without what is around it."""
    before = len(f'{{"index": {index}, "answer": ')
    return begin + before, length - before - len(b"}\n")


def _in_order(partial: BinaryIO, places: Mapping[int, tuple[int, int]]) -> Iterator[bytes]:
    """The lines of the final file."""
    for _, (begin, length) in sorted(places.items()):
        partial.seek(begin)
        yield partial.read(length) + b"\n"


def _digest(requests: Sequence[Answered]) -> str:
    """The SHA-256 of the requests, with what the program adds to them."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request.identity).encode() + b"\n")
    return digest.hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of a partial file; {} if it is damaged, because no header or answer is empty."""
    with contextlib.suppress(ValueError):
        return parse_object(line)
    return {}

"""Many prompts in a file, their answers in another: JSON lines in, JSON lines out, and an interrupted run goes on.

    answers.jsonl.partial   header, answer 1, answer 2, ...     while the run goes on
    answers.jsonl           answer 1, answer 2, ..., answer n   when it is over

An answer is one write to the operating system, which survives the death of the process. What a kill can leave behind
is half a line at the end, and the next run drops it.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

from .sampling import Sampling

_MOST_REPORTED = 10  # bad lines
_HEADER_BEGIN = b'{"phi3_jax_batch": '
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the input.

    Attributes:
      line: its number in the file, from 1 on.
      fields: the line as it was read; it comes back in the output.
      prompt: the text to continue, or None.
      messages: the conversation to answer, or None. One of the two is there.
      max_new_tokens: the line's own, or None.
      sampling: the program's, with the line's own values in place.
    """

    line: int
    fields: dict[str, Any]
    prompt: str | None
    messages: list[dict[str, str]] | None
    max_new_tokens: int | None
    sampling: Sampling


def read_requests(path: str | os.PathLike[str], sampling: Sampling) -> list[Request]:
    """The requests of a file in UTF-8 with one JSON object per line; blank lines do not count.

    An object has either "prompt", a text, or "messages", a list of {"role": text, "content": text}; and it may have
    "id" (text or a number; comes back in the output), "max_new_tokens" and every field of `Sampling`, where null is
    None and the keys of "logit_bias" are ids in quotes. Other keys are refused: one could be a typing error.

    Args:
      sampling: of what a line does not say itself. Its seed + i is the seed of request i, counted from 0.

    Raises:
      FileNotFoundError: no such file.
      ValueError: there are no requests, or some lines cannot be used; names up to ten of these with the reasons.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; name a file with one JSON object per line")
    requests: list[Request] = []
    bad: list[str] = []
    first_with_id: dict[Any, int] = {}
    for line, raw in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            request = _request(line, raw, len(requests), sampling)
            if "id" in request.fields and (first := first_with_id.setdefault(request.fields["id"], line)) != line:
                raise ValueError(f"id={_shown(request.fields['id'])} is the id of line {first}, too")
            requests.append(request)
        except ValueError as error:
            bad.append(f"{path}:{line}: {error}")
    if bad:
        more = [f"and {len(bad) - _MOST_REPORTED} more"] if len(bad) > _MOST_REPORTED else []
        advice = f'a line holds "prompt" or "messages"; it may also hold {", ".join(sorted(_OPTIONAL))}'
        raise ValueError("\n".join([*bad[:_MOST_REPORTED], *more, advice]))
    if not requests:
        raise ValueError(f"{path}: holds no requests; write one JSON object per line")
    return requests


class AnswerFile:
    """Writes the answers of a batch; a context manager.

    Leaving the `with` block with all answers written gives the file its name, whatever the reason for leaving; with
    fewer, the partial file stays for a later run with the same arguments, which goes on at `requests[done]`.

    Attributes:
      done: how many requests have their answers, those of an earlier run included.
    """

    def __init__(self, path: str | os.PathLike[str], requests: Sequence[Request], settings: Mapping[str, Any]):
        """Opens the partial file, and locks it for as long as this object is open.

        Args:
          path: of the file to be; it must not exist.
          settings: whatever else decides the answers; only a run with the same ones may go on. Has to be JSON.

        Raises:
          FileNotFoundError: there is no such folder.
          OSError: the folder or the partial file cannot be written to, or the disk is full.
          ValueError: the file exists, another process is writing it, or the partial file is not of this batch.
        """
        self._path, self._partial = Path(path), Path(f"{Path(path)}.partial")
        self._requests = requests
        self.done = 0
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"{self._path}: there is no folder {self._path.parent}; make it first")
        if not os.access(self._path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{self._path}: the folder cannot be written to; choose another one")
        self._file = self._open_locked()
        try:
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

        When this returns, the answer survives a kill of the process (not a power cut). When it raises, nothing has been
        written, and what had been is kept.

        Raises:
          OSError: the disk is full, for example.
          ValueError: there are no more requests, or the answer cannot be written: it has a key of a request, or a
            number such as NaN that JSON does not know.
        """
        if self.done == len(self._requests):
            raise ValueError(f"{self._path}: all {self.done} requests have their answers")
        if taken := sorted(answer.keys() & _FORMS.keys()):
            raise ValueError(f"{self._path}: the answer has {taken}, which are keys of requests; rename them")
        self._append({**self._requests[self.done].fields, **answer})
        self.done += 1

    def _refuse_existing(self) -> None:
        if os.path.lexists(self._path):
            raise ValueError(f"{self._path}: exists already; choose another name or delete it")

    def _open_locked(self) -> FileIO:
        """The partial file, made if need be. The kernel drops the lock with the process, so none is left by a kill."""
        while True:
            with (
                _explained(self._partial, "choose an output on a disk that takes files, and locks on them"),
                contextlib.ExitStack() as stack,
            ):
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
        """Takes over what the partial file holds; begins it if that is nothing."""
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
                    self._check_answer(line)
                    self.done += 1
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end == 0:
            self._append(header)
            self._header_end = self._end

    def _check_header(self, line: bytes, header: Mapping[str, Any]) -> None:
        """Refuses files of other batches, and files that are none of ours; half a header passes."""
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
        if changed := [f"{name} was {was.get(name, 'absent')} and is {is_.get(name, 'absent')}" for name in names]:
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
        """Refuses a line that is not the answer of `requests[done]`."""
        answer = _parsed(line)
        if self.done == len(self._requests) or not answer.items() >= self._requests[self.done].fields.items():
            raise ValueError(f"{self._partial}: line {self.done + 2} is damaged; delete the file to begin again")

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
        """Copies the answers, without the header, to where they belong; all of them appear there at once."""
        # Of a fixed name, which the lock makes ours, so that kills do not pile up copies.
        copy = Path(f"{self._partial}.copy")
        with _explained(self._path, f"all answers are in {self._partial}: run the same command to finish"):
            try:
                with open(copy, "wb") as target:
                    self._file.seek(self._header_end)
                    shutil.copyfileobj(self._file, target)
                    target.flush()
                    os.fsync(target.fileno())
                self._refuse_existing()
                os.replace(copy, self._path)
            finally:
                copy.unlink(missing_ok=True)
            if self._is_at_its_place(self._file):
                self._partial.unlink()


@contextlib.contextmanager
def _explained(file: Path, remedy: str) -> Iterator[None]:
    """OSErrors name the file and the remedy; their class and errno stay."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {remedy}", str(file)) from error


def _digest(requests: Sequence[Request]) -> str:
    """Of all that the requests say and the program adds to them."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps([request.fields, request.max_new_tokens, repr(request.sampling)]).encode() + b"\n")
    return digest.hexdigest()


def _request(line: int, raw: bytes, index: int, sampling: Sampling) -> Request:
    fields = _parse(raw)
    if unknown := sorted(fields.keys() - _FORMS.keys()):
        raise ValueError(f"unknown keys {unknown}")
    if len(fields.keys() & {"prompt", "messages"}) != 1:
        raise ValueError('exactly one of "prompt" and "messages" has to be there')
    for key, value in fields.items():
        is_good, wanted = _FORMS[key]
        if not is_good(value):
            raise ValueError(f"{key}={_shown(value)} must be {wanted}")
    own = {"seed": (sampling.seed + index) % 2**32} | {key: fields[key] for key in fields.keys() & _SAMPLING.keys()}
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
    optional = {key: fields.get(key) for key in ("prompt", "messages", "max_new_tokens")}
    return Request(line, fields, **optional, sampling=dataclasses.replace(sampling, **own))


def _parse(raw: bytes) -> dict[str, Any]:
    """One line as a JSON object; stricter than `json.loads`. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key!r} is there twice")
            result[key] = value
        return result

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):  # 1e999 as well
            raise ValueError(f"{number} is not a finite number")
        return value

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        # "\ud800" is JSON, but cannot be tokenised, nor written as UTF-8.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not a request: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {_shown(value)}")
    return value


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of a partial file; {} if it is damaged, which no header or answer is."""
    with contextlib.suppress(ValueError):
        return _parse(line)
    return {}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int in Python, but never meant as one


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_whole(value) and abs(value) <= 2**53)  # more may be no float


def _is_bias(value: Any) -> bool:
    # int() alone would also take "1_0" and " 1"; and with leading zeros two keys could be one token.
    keys_are_ids = isinstance(value, dict) and all(re.fullmatch("0|[1-9][0-9]{0,9}", key) for key in value)
    return keys_are_ids and all(map(_is_number, value.values()))


def _is_message(value: Any) -> bool:
    has_keys = isinstance(value, dict) and value.keys() == {"role", "content"}
    return has_keys and all(isinstance(text, str) for text in value.values())


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_message, value))


# Whether a value has the form that it should have, and that form in words. Which numbers make sense `Sampling` says.
_Form = tuple[Callable[[Any], bool], str]
_BY_TYPE: dict[Any, _Form] = {
    int: (_is_whole, "a whole number"),
    float: (_is_number, "a number"),
    int | None: (lambda x: x is None or _is_whole(x), "a whole number or null"),
    float | None: (lambda x: x is None or _is_number(x), "a number or null"),
    Sequence[int]: (lambda x: isinstance(x, list) and all(map(_is_whole, x)), "a list of token ids"),
    Mapping[int, float]: (_is_bias, 'an object such as {"123": 1.5}, from token ids to numbers'),
}
# A field of Sampling of a type that is not above fails here, on import, and not silently later.
_SAMPLING: dict[str, _Form] = {name: _BY_TYPE[kind] for name, kind in typing.get_type_hints(Sampling).items()}
_OPTIONAL: dict[str, _Form] = {
    "id": (lambda x: isinstance(x, str | float) or _is_whole(x), "a text or a number"),
    "max_new_tokens": (lambda x: _is_whole(x) and x >= 1, "a whole number of at least 1"),
    **_SAMPLING,
}
_FORMS: dict[str, _Form] = {
    "prompt": (lambda x: isinstance(x, str) and x != "", "a text that is not empty"),
    "messages": (_are_messages, 'a list, not empty, of {"role": text, "content": text}'),
    **_OPTIONAL,
}

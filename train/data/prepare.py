"""A data file -> a dataset: tokenised once, line by line, and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from phi3_jax.progress import OnProgress
from phi3_jax.text import Tokenizer

from ..settings import Settings
from .dataset import DTYPES, Dataset, Report, open_dataset, write_header
from .examples import Text, read_line
from .packing import FirstFit

_VERSION = 2  # of how lines become rows: a new one makes old datasets invalid
_READ_BY_DATA = ("method", "loss_on", "on_bad_line", "sequence_length", "pack")  # what decides what the rows are
_REASONS_KEPT = 1000


def prepare(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    settings: Settings,
    folder: str | os.PathLike[str],
    on_progress: OnProgress | None = None,
) -> Dataset:
    """Tokenises a file of JSON lines (examples.py) and keeps the result in a folder; the next time it is only mapped.

    The file is read once, front to back, and written as it is read, so that it may be larger than the memory, which
    holds only 24 bytes for each text. The result is found again by the file's path, size and time, the vocabulary, and
    the settings that matter. It is written atomically; if several processes want it, one of them makes it.

    Args:
      on_progress: called with (bytes done, bytes in all) of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no line can be used; or, with on_bad_line="stop", one cannot.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give one of JSON lines")
    target = Path(folder) / _key(source, tokenizer, settings)[:16]
    shape = (settings.sequence_length, settings.method == "dpo")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        dataset = open_dataset(target, *shape)
        if dataset is None:
            partial = target.with_suffix(".partial")
            for stale in (target, partial):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
            try:
                _Writer(partial, settings).write(source, tokenizer, on_progress)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            dataset = open_dataset(target, *shape)
    if dataset is None:
        raise OSError(f"{target}: what was just written there is not there any more")
    return dataset


def _key(source: Path, tokenizer: Tokenizer, settings: Settings) -> str:
    """A hash by which the result is found again, without reading the file."""
    status = source.stat()
    document = {
        "version": _VERSION,
        "file": [str(source.resolve()), status.st_size, status.st_mtime_ns],
        "settings": [getattr(settings, name) for name in _READ_BY_DATA],
        "vocabulary": tokenizer.pieces,
        "added_tokens": [dataclasses.astuple(token) for token in tokenizer.added_tokens],
        "tokenizer": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.chat_template],
    }
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Writer:
    """The one pass over a file."""

    def __init__(self, folder: Path, settings: Settings):
        self._folder, self._settings = folder, settings
        self._fit = FirstFit(settings.sequence_length) if settings.pack else None
        self._starts, self._rows = array("q", [0]), array("q")  # of each text: where it ends, and its row
        self._learned = 0
        self._hash = hashlib.sha256()
        self._bad_lines = 0
        self._reasons: list[tuple[int, str]] = []
        self._ignored: set[str] = set()

    def write(self, source: Path, tokenizer: Tokenizer, on_progress: OnProgress | None) -> None:
        size = source.stat().st_size
        with (
            open(source, "rb") as lines,
            open(self._folder / "tokens.bin", "wb") as tokens,
            open(self._folder / "learned.bin", "wb") as learned,
        ):
            for number, line in enumerate(lines, 1):
                if on_progress is not None:
                    on_progress(lines.tell(), size)
                if not line.strip():
                    continue
                try:
                    texts, ignored = read_line(line, tokenizer, self._settings)
                except ValueError as error:
                    self._refuse(source, number, str(error))
                    continue
                self._ignored |= ignored
                self._add(texts, tokens, learned)
        if not self._rows:
            raise ValueError(f"{source}: no line of it can be used{self._first_reason()}")
        self._finish()

    def _refuse(self, source: Path, number: int, reason: str) -> None:
        if self._settings.on_bad_line == "stop":
            raise ValueError(f"{source}, line {number}: {reason} (on_bad_line=skip leaves such lines out)")
        self._bad_lines += 1
        if len(self._reasons) < _REASONS_KEPT:
            self._reasons.append((number, reason))

    def _first_reason(self) -> str:
        return "; line {}: {}".format(*self._reasons[0]) if self._reasons else ": it is empty"

    def _add(self, texts: list[Text], tokens: IO[bytes], learned: IO[bytes]) -> None:
        """Adds the texts of one line; the two of a preference share a row, others need not."""
        first_row = self._rows[-1] + 1 if self._rows else 0
        for index, text in enumerate(texts):
            for file, values in ((tokens, text.tokens), (learned, text.learned)):
                file.write(values.tobytes())
                self._hash.update(values.tobytes())
            self._learned += int(text.learned.sum())
            self._starts.append(self._starts[-1] + len(text.tokens))
            if self._fit is not None:
                row = self._fit.place(len(text.tokens))
            else:
                row = first_row + (0 if self._settings.method == "dpo" else index)
            self._rows.append(row)

    def _finish(self) -> None:
        row_of = np.asarray(self._rows)
        counts = np.bincount(row_of)
        index = {
            "text_starts": np.asarray(self._starts),
            "row_texts": np.argsort(row_of, kind="stable"),
            "row_starts": np.concatenate([[0], np.cumsum(counts)]),
        }
        for name, values in index.items():
            content = np.ascontiguousarray(values, DTYPES[name]).tobytes()
            (self._folder / f"{name}.bin").write_bytes(content)
            self._hash.update(content)
        tokens, texts, rows = self._starts[-1], len(row_of), len(counts)
        places = rows * self._settings.sequence_length * (2 if self._settings.method == "dpo" else 1)
        report = Report(
            texts=texts,
            rows=rows,
            tokens=tokens,
            learned_tokens=self._learned,
            efficiency=tokens / places,
            bad_lines=self._bad_lines,
            reasons=tuple(self._reasons),
            ignored_fields=tuple(sorted(self._ignored)),
        )
        sizes = {name: len(values) for name, values in index.items()}
        write_header(self._folder, report, sizes | {"tokens": tokens, "learned": tokens}, self._hash.hexdigest())

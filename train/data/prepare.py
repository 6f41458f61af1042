"""Data files -> a dataset: tokenised once, entry by entry, and kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.progress import OnProgress
from phi3_jax.text import Tokenizer

from .. import fingerprint
from ..settings import Settings
from .dataset import DTYPES, Dataset, open_dataset, write_header
from .examples import Example, encode_forms
from .files import Entry, read_entries
from .forms import digest, read_form
from .packing import FirstFit
from .report import Tally
from .sources import find_files
from .truncation import Text, TooLongError

Part = Literal["all", "train", "held_out"]
_VERSION = 4  # of how lines become rows: a new one makes old datasets invalid
# What makes other rows; if lines are held out, the seed does so, too.
_READ_BY_DATA = ("method", "loss_on", "on_bad_line", "parse_special", "truncate", "sequence_length", "pack")


def prepare(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    settings: Settings,
    folder: str | os.PathLike[str],
    on_progress: OnProgress | None = None,
    part: Part = "all",
) -> Dataset:
    """Tokenises a data set (sources.py) and keeps the result in a folder; the next time it is only mapped.

    Its files are read once, front to back, and written as they are read, so that they may be larger than the memory,
    which holds only 32 bytes for each text. The result is found again by the files' paths, sizes and times, the
    vocabulary, and the settings that matter. It is written atomically; if several processes want it, one of them makes
    it.

    Args:
      path: a file, or what else sources.py knows.
      on_progress: called with (bytes done, bytes in all) of the files.
      part: all lines, or those that `eval_fraction` leaves to training or holds out; of these there may be none.

    Raises:
      FileNotFoundError: there is no such file or data set.
      ImportError: a package is missing that reads it.
      ValueError: no line can be used; or, with on_bad_line="stop", one cannot.
    """
    sources = find_files(path)
    target = Path(folder) / _key(sources, tokenizer, settings, part)[:16]
    shape = (settings.sequence_length, settings.method == "dpo")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        try:
            dataset = open_dataset(target, *shape)
        except ValueError as error:
            warnings.warn(f"{target}: prepared data that cannot be used ({error}): made again", stacklevel=2)
            dataset = None
        if dataset is None:
            shutil.rmtree(target, ignore_errors=True)
            with new_folder(target, 0) as partial:
                _Writer(partial, settings, part).write(sources, tokenizer, on_progress)
            dataset = open_dataset(target, *shape)
    if dataset is None:
        raise OSError(f"{target}: what was just written there is not there any more")
    return dataset


def _key(sources: Sequence[Path], tokenizer: Tokenizer, settings: Settings, part: Part) -> str:
    """A hash by which the result is found again, without reading the files."""
    document = {
        "version": _VERSION,
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources],
        "settings": [getattr(settings, name) for name in _READ_BY_DATA],
        "part": [part, settings.eval_fraction, settings.seed] if part != "all" else [],
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
    }
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held_out(line: int, settings: Settings) -> bool:
    """Whether `eval_fraction` holds out a line; the hash of its contents and the seed decide, and no other line."""
    content = line.to_bytes(8, "little") + str(settings.seed).encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return number < settings.eval_fraction * 2**64


class _Writer:
    """The one pass over the files."""

    def __init__(self, folder: Path, settings: Settings, part: Part):
        self._folder, self._settings, self._part = folder, settings, part
        self._fit = FirstFit(settings.sequence_length) if settings.pack else None
        self._starts, self._rows = array("q", [0]), array("q")  # of each text: where it ends, and its row
        self._lines = array("Q")
        self._learned = self._of_other_part = 0
        self._hash = hashlib.sha256()
        self._tally = Tally()

    def write(self, sources: Sequence[Path], tokenizer: Tokenizer, on_progress: OnProgress | None) -> None:
        before, total = 0, sum(source.stat().st_size for source in sources)
        with open(self._folder / "tokens.bin", "wb") as tokens, open(self._folder / "learned.bin", "wb") as learned:
            for source in sources:
                for entry in read_entries(source):
                    if on_progress is not None:
                        on_progress(before + entry.done, total)
                    if example := self._read(entry, source, len(sources) > 1, tokenizer):
                        self._add(example.texts, tokens, learned)
                before += source.stat().st_size
        if not self._rows and self._part != "held_out":
            raise ValueError(f"{sources[0]}: no line of it can be used{self._why_none()}")
        self._finish()

    def _read(self, entry: Entry, source: Path, is_one_of_several: bool, tokenizer: Tokenizer) -> Example | None:
        """The texts of an entry; None if it is left out."""
        is_read = False
        try:
            forms, notes = read_form(entry.fields(), self._settings.method)
            is_read, line = True, digest(forms)
            if self._part != "all" and is_held_out(line, self._settings) != (self._part == "held_out"):
                self._of_other_part += 1
                return None
            example = encode_forms(forms, notes, tokenizer, self._settings)
        except TooLongError as error:
            self._tally.skip(entry.number, str(error))
        except ValueError as error:
            if self._part == "held_out" and not is_read:  # the other part tells of it
                return None
            if self._settings.on_bad_line == "stop":
                where = f"{source}, {entry.unit} {entry.number}"
                raise ValueError(f"{where}: {error} (on_bad_line=skip leaves such lines out)") from None
            self._tally.refuse(entry.number, f"{source.name}: {error}" if is_one_of_several else str(error))
        else:
            self._tally.add(f"{source}, {entry.unit} {entry.number}", example)
            self._lines.append(line)
            return example
        return None

    def _why_none(self) -> str:
        for number, reason in [*self._tally.reasons, *self._tally.too_long_reasons][:1]:
            return f"; line {number}: {reason}"
        if self._of_other_part:
            return f": eval_fraction={self._settings.eval_fraction} holds out all of them; lower it"
        return ": it is empty"

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
        row_of = np.asarray(self._rows, np.int64)
        counts = np.bincount(row_of)
        index = {
            "text_starts": np.asarray(self._starts),
            "row_texts": np.argsort(row_of, kind="stable"),
            "row_starts": np.concatenate([[0], np.cumsum(counts)]),
            "lines": np.asarray(self._lines),
        }
        for name, values in index.items():
            content = np.ascontiguousarray(values, DTYPES[name]).tobytes()
            (self._folder / f"{name}.bin").write_bytes(content)
            if name != "lines":  # the fingerprint is of the rows
                self._hash.update(content)
        tokens, texts, rows = self._starts[-1], len(row_of), len(counts)
        places = rows * self._settings.sequence_length * (2 if self._settings.method == "dpo" else 1)
        report = self._tally.report(texts, rows, tokens, self._learned, tokens / places if rows else 0.0)
        sizes = {name: len(values) for name, values in index.items()}
        write_header(self._folder, report, sizes | {"tokens": tokens, "learned": tokens}, self._hash.hexdigest())

"""Texts in token ids, in files that are memory-mapped; rows are put together from them when they are asked for.

    tokens.bin        int32, the texts one after the other
    learned.bin       bool, one for each token
    text_starts.bin   int64 [texts + 1], where in the two files above each text begins
    row_texts.bin     int64 [texts], texts in the order of the rows that they are in
    row_starts.bin    int64 [rows + 1], where in the file above each row begins
    lines.bin         uint64 [lines], a hash of the contents of each line that is used (forms.py)
    header.json       the report, the lengths of the other files, the fingerprint of the rows, and SHA-256 of all files

Axis letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.json_files import SETTINGS, read_bytes
from phi3_jax.regular_file import require_regular

from .. import fingerprint
from .batch import Batch, Pair
from .report import Report

DTYPES: dict[str, type] = {
    "tokens": np.int32,
    "learned": np.bool_,
    "text_starts": np.int64,
    "row_texts": np.int64,
    "row_starts": np.int64,
    "lines": np.uint64,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows to train on; `len` is their number.

    Attributes:
      report: statistics of the file.
      fingerprint: a hash of the rows' contents; a run that is resumed needs the same one.
      sequence_length: T.
      preferences: whether each row is a pair of answers ("dpo").
    """

    report: Report
    fingerprint: str
    sequence_length: int
    preferences: bool
    _arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.report.rows

    @property
    def counts(self) -> tuple[int]:
        """The number of rows, as of a mixture of one (mixture.py)."""
        return (len(self),)

    @property
    def lines(self) -> np.ndarray:
        """A hash of each line, uint64 [lines]; equal lines have equal ones."""
        return self._arrays["lines"]

    def highest_id(self) -> int:
        """The highest token id in it, -1 if it is empty."""
        return int(self._arrays["tokens"].max(initial=-1))

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch | Pair:
        """The rows with these indices, in this order: numpy arrays [B, T]. An index of -1 gives a row of padding."""
        texts = [self._texts_of(int(index)) for index in indices]
        if self.preferences:
            return Pair(self._lay_out([each[:1] for each in texts]), self._lay_out([each[1:] for each in texts]))
        return self._lay_out(texts)

    def _texts_of(self, row: int) -> np.ndarray:
        if row == -1:
            return np.zeros(0, np.int64)
        begin, end = self._arrays["row_starts"][row : row + 2]
        return self._arrays["row_texts"][begin:end]

    def _lay_out(self, rows: Sequence[np.ndarray]) -> Batch:
        shape = (len(rows), self.sequence_length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights, positions = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        for row, texts in enumerate(rows):
            at = 0
            for segment, text in enumerate(texts):
                begin, end = self._arrays["text_starts"][text : text + 2]
                place = row, slice(at, at + end - begin)
                tokens[place] = self._arrays["tokens"][begin:end]
                weights[place] = self._arrays["learned"][begin:end]
                positions[place] = np.arange(end - begin)
                segments[place] = segment
                at += end - begin
        return Batch(tokens, weights, positions, segments)


def write_header(folder: Path, report: Report, sizes: dict[str, int], of_rows: str) -> None:
    """Writes the last file of a dataset: `sizes` are the numbers of elements of the others."""
    digests = _digests(folder)
    report_fields = json.loads(json.dumps(dataclasses.asdict(report)))
    content = {"report": report_fields, "sizes": sizes, "fingerprint": of_rows, "sha256": digests}
    content["sha256_of_this"] = _digest_of(content)
    (folder / "header.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_dataset(folder: Path, sequence_length: int, preferences: bool) -> Dataset | None:
    """The dataset in a folder, mapped; None if it is not there.

    Raises:
      ValueError: it is not whole, or a byte of it is not what was written; says what.
    """
    if not folder.exists():
        return None
    try:
        header: dict[str, Any] = json.loads(read_bytes(folder / "header.json", SETTINGS))
        if "sha256_of_this" not in header:
            raise ValueError("of an earlier version, without checksums")
        if header.pop("sha256_of_this") != _digest_of(header):
            raise ValueError("header.json is damaged")
        fields, sizes, of_rows = header["report"], header["sizes"], header["fingerprint"]
        for name, dtype in DTYPES.items():
            path = folder / f"{name}.bin"
            require_regular(path)
            if path.stat().st_size != sizes[name] * np.dtype(dtype).itemsize:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
        found = _digests(folder)
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in DTYPES.items():
            path = folder / f"{name}.bin"
            if found[name] != header["sha256"][name]:
                raise ValueError(f"{path.name} is not what was written: its SHA-256 is another")
            arrays[name] = np.memmap(path, dtype, mode="r") if sizes[name] else np.zeros(0, dtype)
        fields |= {
            "reasons": tuple((line, reason) for line, reason in fields["reasons"]),
            "too_long_reasons": tuple((line, reason) for line, reason in fields["too_long_reasons"]),
            "ignored_fields": tuple(fields["ignored_fields"]),
            "converted": tuple((what, lines) for what, lines in fields["converted"]),
            "first_spelled": fields["first_spelled"] and tuple(fields["first_spelled"]),
        }
        report = Report(**fields)
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename).name} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("header.json is damaged") from None
    return Dataset(report, of_rows, sequence_length, preferences, arrays)


def _digests(folder: Path) -> dict[str, str]:
    return dict(zip(DTYPES, fingerprint.of_files(folder / f"{name}.bin" for name in DTYPES), strict=True))


def _digest_of(header: dict[str, Any]) -> str:
    return fingerprint.of_text(json.dumps(header, sort_keys=True))

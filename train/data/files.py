"""A data file -> its entries, one after the other: JSON lines or objects, an array, csv, tsv, parquet or Arrow.

What a file is, is known by its contents, and csv by its name; JSON and csv may be compressed by gzip, bzip2 or xz. No
file is held in memory as a whole.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from .json_array import LONGEST, decode, read_array, read_objects

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_REFUSED = {
    b"\xff\xfe": "text in UTF-16; convert it to UTF-8",
    b"\xfe\xff": "text in UTF-16; convert it to UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder",
}
_BOM = codecs.BOM_UTF8
_HEAD = 1 << 16
# Scalars may stand before the list in {"version": 1, "data": [{...}, ...]}.
_SCALAR = rb'"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\deE]+|null|true|false)\s*,\s*'
_ARRAY = re.compile(rb'\s*(?:\[|\{\s*(?:' + _SCALAR + rb')*"data"\s*:\s*\[)(?=\s*\{)')  # fmt: skip

_FOR_ALL = re.compile(rb'"(system|system_prompt|tools|functions)"\s*:')  # what would get lost


class Entry(NamedTuple):
    """A line of JSON lines, an element of an array or a row of a table.

    Attributes:
      unit, number: how to name it: ("line", 7). They count from 1.
      done: bytes of the file read so far.
      record: its fields; None if it cannot be read.
      problem: why not.
    """

    unit: str
    number: int
    done: int
    record: dict[str, Any] | None
    problem: str = ""

    def fields(self) -> dict[str, Any]:
        """The record. Raises ValueError if it cannot be read."""
        if self.record is None:
            raise ValueError(self.problem)
        return self.record


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a file, in order; blank lines are left out.

    Raises:
      ValueError: the file, or the rest of it, cannot be read; names the file.
      ImportError: a package is missing that reads it.
    """
    try:
        with open(path, "rb") as raw:
            yield from _open(path, raw)
    except (ValueError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # else it is gzip's or bz2's, of damaged contents
            raise
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None  # pyarrow's have several lines


def _open(path: Path, raw: IO[bytes]) -> Iterator[Entry]:
    start = raw.read(32)
    raw.seek(0)
    for magic, reason in _REFUSED.items():
        if start.startswith(magic):
            raise ValueError(reason)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if start.startswith(b"PAR1"):
        return _parquet(path)
    if start.startswith(b"ARROW1") or suffixes[-1:] == [".arrow"]:
        return _arrow(path, start.startswith(b"ARROW1"))
    file: IO[bytes] = raw
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic):
            file = COMPRESSED[suffix](raw)
            suffixes = suffixes[:-1] if suffixes[-1:] == [suffix] else suffixes
    if suffixes[-1:] in ([".csv"], [".tsv"]):
        return _csv(file, "\t" if suffixes[-1] == ".tsv" else ",", raw.tell)
    head = file.read(_HEAD)
    bom = len(_BOM) if head.startswith(_BOM) else 0
    if found := _ARRAY.match(head[bom:]):
        if lost := _FOR_ALL.search(found[0]):
            raise ValueError(f"{lost[1].decode()} stands beside the list in data; write it into each entry")
        file.seek(bom + found.end())
        return _values(read_array(file, is_inside=b"{" in found[0]), raw.tell)
    if head[bom:].lstrip().partition(b"\n")[0].strip() == b"{":
        file.seek(bom)
        return _values(read_objects(file), raw.tell)
    file.seek(0)
    return _lines(file, file.tell if file is raw else raw.tell)


def _lines(file: IO[bytes], position: Callable[[], int]) -> Iterator[Entry]:
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise ValueError(
                f"line {number} is longer than {LONGEST} bytes; write one object on each line, and cut longer texts"
            )
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            try:
                record, problem = decode(line.decode()), ""
            except UnicodeDecodeError as error:
                record, problem = None, f"it is not JSON: not UTF-8 ({error.reason} at byte {error.start})"
            except (ValueError, RecursionError) as error:
                record, problem = None, f"it is not JSON ({error}); write one whole object on each line"
            yield _entry("line", number, position(), record, problem)


def _values(values: Iterator[Any], position: Callable[[], int]) -> Iterator[Entry]:
    for number, value in enumerate(values, 1):
        yield _entry("entry", number, position(), value)


def _entry(unit: str, number: int, done: int, value: Any, problem: str = "") -> Entry:
    if not problem and not isinstance(value, dict):
        problem = "it is JSON but not an object; write {...} on each line"
    return Entry(unit, number, done, None if problem else value, problem)


# ---------------------------------------------------------------- tables


def _csv(file: IO[bytes], delimiter: str, position: Callable[[], int]) -> Iterator[Entry]:
    """The first row names the columns; an empty cell is an absent field, as for pandas."""
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError(f"the header names a column twice: {header}")
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            record, problem = None, ""
            if len(row) > len(header):
                problem = f"it has {len(row)} columns, the header {len(header)}"
            else:
                record = {name: text for name, text in zip(header, row, strict=False) if text}
            yield Entry("row", number, position(), record, problem)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    finally:
        text.detach()  # else it closes the file, which is not its own


def _parquet(path: Path) -> Iterator[Entry]:
    parquet, size = _pyarrow("pyarrow.parquet"), path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            _check_columns(file.schema_arrow.names)
            for number, record in enumerate((r for b in file.iter_batches(256) for r in _records(b)), 1):
                yield Entry("row", number, size * number // total, _without_nulls(record))
    except OSError as error:  # of damaged contents too
        raise ValueError(f"not a whole parquet file ({error}); fetch it again") from None


def _arrow(path: Path, is_file: bool) -> Iterator[Entry]:
    """As `datasets` saves to disk."""
    ipc, number = _pyarrow("pyarrow.ipc"), 0
    try:
        with open(path, "rb") as raw:
            reader = ipc.open_file(raw) if is_file else ipc.open_stream(raw)
            _check_columns(reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for begin in range(0, batch.num_rows, 256):
                    for record in _records(batch.slice(begin, 256)):
                        number += 1
                        yield Entry("row", number, raw.tell(), _without_nulls(record))
    except OSError as error:
        raise ValueError(f"not a whole Arrow file ({error}); fetch it again") from None


def _records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. Python's own times have no nanoseconds: such times are given as text."""
    arrow = _pyarrow("pyarrow")
    batch.validate(full=True)  # damaged offsets reach beyond the file; raises a ValueError
    fields = [field.with_type(_without_nanoseconds(arrow, field.type)) for field in batch.schema]
    schema = arrow.schema(fields)
    return (batch if schema.equals(batch.schema) else arrow.Table.from_batches([batch]).cast(schema)).to_pylist()


def _without_nanoseconds(arrow: Any, kind: Any) -> Any:
    if getattr(kind, "unit", None) == "ns":
        return arrow.string()
    if arrow.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return arrow.struct([field.with_type(_without_nanoseconds(arrow, field.type)) for field in fields])
    if arrow.types.is_list(kind):
        return arrow.list_(kind.value_field.with_type(_without_nanoseconds(arrow, kind.value_type)))
    return kind


def _without_nulls(value: Any) -> Any:
    """A table's structs have all fields of all rows: those that only other rows use are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _check_columns(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"it has the column {twice[0]!r} twice; keep one of them")


def _pyarrow(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("reading parquet and Arrow files needs pyarrow: pip install 'phi3_jax[data]'") from None

"""The header of a GGUF file: metadata and the table of tensors, with every size checked against the file's.

Layout (little endian): magic, version, number of tensors, number of keys; the keys with their values; the table (name,
dimensions, type, offset); padding; the tensors' bytes. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import collections
import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.json_files import shown
from phi3_jax.regular_file import require_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4
# Python objects are much larger than the bytes they come from. The largest vocabularies make headers of about 15 MB.
_MAX_HEADER = 1 << 25
_MAX_ITEMS = 1 << 21  # of all arrays; the largest vocabularies, with their merges, have half of it
_MAX_NAME = 512  # characters
_MAX_ENTRIES = 1 << 16  # tensors, or keys


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One row of the table.

    Attributes:
      shape: slowest axis first ([out, in]), the reverse of the file's order.
      kind: number of the tensor type (`gguf.GGMLQuantizationType`).
      offset: of its first byte in the file.
      path: the file.
      start: of the file's first tensor, where its header and the padding behind it end.
      alignment: where tensors begin, behind that, is a multiple of it.
      crc: the CRC-32 of its bytes, of files that are written here (checksums.py).
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    path: Path
    start: int = 0
    alignment: int = 32
    crc: int | None = None


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata as plain Python values, and the tensors by name.

    Raises:
      ValueError: the file is no GGUF file, is damaged, or is of a version or byte order that is not supported.
    """
    require_regular(path)
    if path.stat().st_size < 24:
        raise damaged(path, "it is shorter than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        reader = _Reader(path, view)
        if reader.take(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file (it does not start with {MAGIC.decode()})")
        version = reader.number("<u4")
        if version not in _VERSIONS:
            order = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            raise ValueError(
                f"{path}: the GGUF file {order}; supported are little-endian files of versions {_VERSIONS}"
            )
        tensors, keys = reader.number("<u8"), reader.number("<u8")
        if max(tensors, keys) > _MAX_ENTRIES:
            raise damaged(path, f"{tensors} tensors and {keys} keys: too many entries announced")
        metadata = _unique(reader, [(reader.name(), reader.value()) for _ in range(keys)], "key")
        table = _unique(reader, [_row(reader) for _ in range(tensors)], "tensor")
        alignment = _alignment(path, metadata)
    start = -(-reader.position // alignment) * alignment
    if unaligned := [name for name, tensor in table.items() if tensor.offset % alignment]:
        raise damaged(path, f"tensors {unaligned[:5]} do not start at a multiple of {alignment} bytes")
    return metadata, {
        name: dataclasses.replace(tensor, offset=start + tensor.offset, start=start, alignment=alignment)
        for name, tensor in table.items()
    }


def damaged(path: Path, what: str) -> ValueError:
    """The error for a damaged file."""
    return ValueError(f"{path}: the GGUF file is damaged or incomplete: {what}; download it again")


class _Reader:
    """Takes values from a mapped file, never past its end."""

    def __init__(self, path: Path, view: mmap.mmap):
        self.path, self.view, self.position, self.items = path, view, 0, 0

    def take(self, size: int) -> bytes:
        if size > len(self.view) - self.position:
            raise damaged(self.path, f"{size} bytes expected at byte {self.position} of {len(self.view)}")
        if size > _MAX_HEADER - self.position:
            raise damaged(self.path, f"its header is longer than {_MAX_HEADER} bytes")
        self.position += size
        return self.view[self.position - size : self.position]

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def string(self) -> str:
        try:
            return self.take(struct.unpack("<Q", self.take(8))[0]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"a string before byte {self.position} is not UTF-8 ({error.reason})") from None

    def name(self) -> str:
        """A key's or a tensor's: a name that an error can show in one line."""
        name = self.string()
        if len(name) > _MAX_NAME or not name.isprintable():
            raise damaged(self.path, f"the name before byte {self.position} is {shown(name)}")
        return name

    def value(self) -> Any:
        kind = self.number("<u4")
        return self.array() if kind == _ARRAY else self.single(kind)

    def single(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _NUMBERS:
            raise damaged(self.path, f"unknown value type {kind} before byte {self.position}")
        number = self.number(_NUMBERS[kind])
        return bool(number) if kind == _BOOL else number

    def array(self) -> list[Any]:
        kind, count = self.number("<u4"), self.number("<u8")
        self.items += count
        if self.items > _MAX_ITEMS:
            raise damaged(self.path, f"{count} items of an array announced before byte {self.position}")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise damaged(self.path, f"unknown array type {kind} before byte {self.position}")
        values = np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])
        return list((values != 0 if kind == _BOOL else values).tolist())


def _row(reader: _Reader) -> tuple[str, GgufTensor]:
    name, dimensions = reader.name(), reader.number("<u4")
    if dimensions > _MAX_DIMENSIONS:
        raise damaged(reader.path, f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reader.number("<u8") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("<u4"), reader.number("<u8")
    if not 0 < math.prod(shape) <= 8 * len(reader.view) or offset > len(reader.view):
        raise damaged(
            reader.path, f"tensor {name!r} {list(shape)} at offset {offset} cannot lie in {len(reader.view)} bytes"
        )
    return name, GgufTensor(shape, kind, offset, reader.path)


def _unique(reader: _Reader, pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise damaged(reader.path, f"duplicate {what} names {sorted(n for n in counts if counts[n] > 1)[:5]}")
    return found


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {shown(alignment)}, not a power of two from 8 on")
    return alignment

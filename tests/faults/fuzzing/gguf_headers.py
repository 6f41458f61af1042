"""The fields of a GGUF header and where they stand, and changes to them."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
BOUNDARIES = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    12,
    31,
    32,
    33,
    63,
    64,
    255,
    1 << 15,
    1 << 16,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
)
BOUNDARIES += (1 << 32, 1 << 33, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


# Types whose blocks have the same size: no reader could tell that one was changed into the other.
_ALIKE = ({1, 30}, {2, 20}, {0, 26}, {28, 11})


class Field(NamedTuple):
    """A number or text in the header.

    Attributes:
      kind: such as "tensor offset", "string length" or "value".
      of: the key or the tensor.
    """

    begin: int
    end: int
    kind: str
    of: str

    @property
    def place(self) -> str:
        """A value is a setting; all else says where and how large things are."""
        layout = self.of.startswith(("general.alignment", "split."))
        return "settings" if self.kind in ("value", "key") and not layout else "header"


class _Walk:
    def __init__(self, content: bytes):
        self.content, self.at, self.fields = content, 0, list[Field]()

    def number(self, size: int, kind: str, of: str) -> int:
        begin, self.at = self.at, self.at + size
        self.fields.append(Field(begin, self.at, kind, of))
        return int.from_bytes(self.content[begin : self.at], "little")

    def text(self, kind: str, of: str | None = None) -> str:
        index, length = len(self.fields), self.number(8, "string length", of or "")
        found = self.content[self.at : self.at + length].decode()
        if of is None:
            self.fields[index] = self.fields[index]._replace(of=found)
        self.fields.append(Field(self.at, self.at + length, kind, of or found))
        self.at += length
        return found

    def value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self.text("value", key)
        elif kind == _ARRAY:
            inner, count = self.number(4, "array type", key), self.number(8, "array count", key)
            for _ in range(count):
                self.value(inner, key)
        else:
            self.number(_SIZES[kind], "value", key)


def is_alike(field: Field, old: bytes, new: bytes) -> bool:
    """Whether a field was changed into another that fits as well, so that the numbers are others in silence."""
    if field.kind != "tensor type":
        return False
    types = {int.from_bytes(each[field.begin : field.end], "little") for each in (old, new)}
    return any(types <= each for each in _ALIKE)


def fields(content: bytes) -> list[Field]:
    """All fields of a valid file, in order."""
    walk = _Walk(content)
    for size, kind in ((4, "magic"), (4, "version")):
        walk.number(size, kind, "")
    tensors, keys = walk.number(8, "tensor count", ""), walk.number(8, "key count", "")
    for _ in range(keys):
        key = walk.text("key")
        walk.value(walk.number(4, "value type", key), key)
    for _ in range(tensors):
        name = walk.text("tensor name")
        for _ in range(walk.number(4, "dimensions", name)):
            walk.number(8, "dimension", name)
        walk.number(4, "tensor type", name)
        walk.number(8, "tensor offset", name)
    return walk.fields


def data_start(content: bytes) -> int:
    """The first byte of the tensors of a valid file that is aligned to 32 bytes."""
    return -(-fields(content)[-1].end // 32) * 32


def change(content: bytes, rng: random.Random) -> tuple[bytes, Field, str]:
    """Changes a field -> (the file, the field, kind of the change)."""
    everything = fields(content)
    kinds = sorted({(field.kind, field.place) for field in everything})
    kind, place = rng.choice(kinds + [("tensor offset", "header")] * 4 + [("dimension", "header")] * 2)
    field = rng.choice([each for each in everything if (each.kind, each.place) == (kind, place)])
    old, size = content[field.begin : field.end], field.end - field.begin
    if kind in ("key", "tensor name") or size > 8 or size == 0:
        position = field.begin + rng.randrange(max(1, size))
        changed = bytearray(content)
        changed[position] = rng.choice((changed[position] ^ (1 << rng.randrange(8)), 0, 0xFF, 0x80))
        return bytes(changed), field, "byte"
    number, how = int.from_bytes(old, "little"), rng.choice(("near", "near", "boundary", "flip", "copy"))
    if how == "near":
        number += rng.choice((-64, -32, -8, -1, 1, 2, 8, 31, 32, 64, 96, 256, 1024))
    elif how == "boundary":
        number = rng.choice(BOUNDARIES)
        if place == "settings" and size == 4 and rng.random() < 0.5:
            number = int.from_bytes(
                struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 1e-40, 3e38))), "little"
            )
    elif how == "flip":
        number ^= 1 << rng.randrange(8 * size)
    else:  # another field's of this kind: overlaps, duplicates
        other = rng.choice([each for each in everything if each.kind == kind])
        number = int.from_bytes(content[other.begin : other.end], "little")
    new = (number % (1 << (8 * size))).to_bytes(size, "little")
    return content[: field.begin] + new + content[field.end :], field, how

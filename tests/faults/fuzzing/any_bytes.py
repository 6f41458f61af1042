"""Changes to any bytes."""

from __future__ import annotations

import random
from typing import NamedTuple

BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF)
# Where text begins, ends, or changes its meaning; and what is no UTF-8.
SNIPPETS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b",",
        b":",
        b"-",
        b"0",
        b"9" * 400,
        b"1e999",
        b"NaN",
    ),
    *(b"null", b"true", b"\n", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"%s" * 9),
    *(b"[" * 20_000, b'{"a":' * 20_000, b"(" * 3_000, b"<|end|>", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b" " * 99_999),
)


class Changed(NamedTuple):
    """Other contents.

    Attributes:
      at: the first byte that is another one.
      resized: whether the file has another length.
    """

    content: bytes
    kind: str
    at: int
    resized: bool


_KEEPING = ("flip", "flip", "set", "zero", "swap")  # the file's length
_KINDS = (*_KEEPING, "insert", "delete", "duplicate", "truncate", "snippet")


def change(content: bytes, rng: random.Random, within: tuple[int, int] | None = None) -> Changed:
    """Changes something, at a place from `within` if given; then mostly without another length."""
    low, high = within or (0, len(content))
    high = max(low + 1, min(high, len(content)))
    kind = rng.choice(_KEEPING if within and rng.random() < 0.5 else _KINDS)
    at = rng.randrange(low, high)
    length = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 512)), max(1, high - at))
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    if kind == "flip":
        piece = bytes([(piece or b"\0")[0] ^ (1 << rng.randrange(8))]) + piece[1:]
    elif kind == "set":
        piece = bytes([rng.choice(BOUNDARIES)]) + piece[1:]
    elif kind == "zero":
        piece = bytes(len(piece))
    elif kind == "insert":
        piece = rng.randbytes(length) + piece
    elif kind == "delete":
        piece = b""
    elif kind == "duplicate":
        piece *= rng.choice((2, 2, 3, 100))
    elif kind == "truncate":
        piece = after = b""
    elif kind == "snippet":
        piece = rng.choice(SNIPPETS) + (piece if rng.random() < 0.5 else b"")
    else:
        other = rng.randrange(low, max(low + 1, high - length))
        at, other = min(at, other), max(at, other)
        a, b = content[at : at + length], content[other : other + length]
        if other >= at + length and len(b) == length:
            swapped = content[:at] + b + content[at + length : other] + a + content[other + length :]
            return Changed(swapped, kind, at, False)
    changed = before + piece + after
    return Changed(changed, kind, at, len(changed) != len(content))

"""Changes to what a file is: missing, empty, a folder, a pipe, a link, a device, huge; and to its encoding."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

HUGE = 100 * 10**9  # bytes of a sparse file


def change(path: Path, rng: random.Random, huge: bool) -> tuple[str, str]:
    """Replaces the file by something else of its name -> (kind, "file"). `huge`: also by a file of 100 GB."""
    kind = rng.choice(sorted(kind for kind in KINDS if huge or "huge" not in kind))
    content = path.read_bytes()
    path.unlink()
    KINDS[kind](path, content)
    return kind, "file"


def encode(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The text in another encoding, or with other ends of lines."""
    text = content.decode("utf-8", "replace")
    kind = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "bom", "bom twice", "crlf", "cr", "nul", "blank"))
    if kind in ("utf-16", "utf-16-le", "utf-32"):
        return text.encode(kind), kind
    changed = {
        "latin-1": ("é" + text).encode("latin-1", "replace"),
        "bom": b"\xef\xbb\xbf" + content,
        "bom twice": b"\xef\xbb\xbf" * 2 + content,
        "crlf": content.replace(b"\n", b"\r\n"),
        "cr": content.replace(b"\n", b"\r"),
        "nul": content + b"\0",
        "blank": b" \n" * 999 + content + b"\n" * 999,
    }
    return changed[kind], kind


def _sparse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.truncate(path, HUGE)


def _socket(path: Path, content: bytes) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _nothing_else(path: Path, content: bytes) -> None:
    """The file is gone, and so is its folder's rest."""
    for each in path.parent.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


KINDS: dict[str, Callable[[Path, bytes], object]] = {
    "missing": lambda path, content: None,
    "folder is empty": _nothing_else,
    "empty": lambda path, content: path.touch(),
    "a folder": lambda path, content: path.mkdir(),
    "a pipe": lambda path, content: os.mkfifo(path),
    "a socket": _socket,
    "a link to itself": lambda path, content: path.symlink_to(path),
    "a link to nothing": lambda path, content: path.symlink_to(path.parent / "nothing"),
    "a link to a device": lambda path, content: path.symlink_to("/dev/zero"),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "huge and sparse": _sparse,
    "twice": lambda path, content: path.write_bytes(content * 2),
    "a pointer of Git LFS": lambda path, content: path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    ),
    "a pickle": lambda path, content: path.write_bytes(b"\x80\x04cos\nsystem\n(Vfalse\ntR."),
    "an archive": lambda path, content: path.write_bytes(b"PK\x03\x04" + bytes(64)),
}

"""Readers with faults that the instrument must find, for its own test."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzzing.reader import Read, Reader

_HEADER = {"w": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}
_DATA = np.arange(40, dtype=np.float32).tobytes()


def _make(folder: Path, _: int) -> None:
    header = json.dumps(_HEADER).encode()
    (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + _DATA)


def _content(folder: Path) -> bytes:
    """As it should be: what cannot be read is refused, in one line."""
    path = folder / "x.safetensors"
    if not path.is_file() or path.stat().st_size > 1_000_000:
        raise ValueError(f"{path}: not a small file")
    return path.read_bytes()


def _good(folder: Path, _: int) -> Read:
    content = _content(folder)
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        whole = header == _HEADER and len(content) == 8 + length + 160
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{folder / 'x.safetensors'}: damaged")
    return {"weights": content[-160:].hex()}


def _silent(folder: Path, _: int) -> Read:
    return {"weights": _content(folder).hex()}


def _does(what: Callable[[], object]) -> Reader:
    """Does something with what should be refused."""

    def read(folder: Path, variant: int) -> Read:
        try:
            return _good(folder, variant)
        except ValueError:
            what()
            raise

    return Reader(_make, read)


def _loop() -> None:
    while True:
        pass


def _raises(error: Exception) -> Reader:
    def fail() -> None:
        raise error

    return _does(fail)


def _tells(folder: Path, variant: int) -> Read:
    """Knows what was written, as by a checksum, and takes that with a warning."""
    found, written = _good(folder, variant), {"weights": _DATA.hex()}
    return found if found == written else {**written, "told": "damaged"}


READERS = {
    "good": Reader(_make, _good),
    "told": Reader(_make, _tells, checksums=True),
    "silent": Reader(_make, _silent),
    "no checksum": Reader(_make, _good, checksums=True),
    "KeyError": _raises(KeyError("w")),
    "MemoryError": _raises(MemoryError()),
    "two lines": _raises(ValueError("x.safetensors\nis damaged")),
    "no name": _raises(ValueError("damaged")),
    "hang": _does(lambda: time.sleep(100)),
    "loop": _does(_loop),
    "memory": _does(lambda: np.ones(500_000_000, np.uint8).sum()),
    "abort": _does(os.abort),
    "exit": _does(lambda: os._exit(0)),
    "killed": _does(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
}

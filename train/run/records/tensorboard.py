"""Writes numbers and texts over steps into TensorBoard's files, immediately and without another thread.

A file is a sequence of records: length uint64, its checksum, the data, its checksum (TensorFlow's record_writer.h). The
data are protocol buffers of the type Event (TensorFlow's event.proto), few fields of which are needed here.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # CRC-32C's polynomial, bits reversed
        table.append(byte)
    return table


_TABLE = _crc_table()
_COUNTER = itertools.count()
_STRING = 7  # of TensorFlow's DataType


class EventFile:
    """A new file of events in a folder, to be closed."""

    def __init__(self, folder: Path, step: int):
        """Opens the file, and tells TensorBoard to ignore events of earlier files in the folder from `step` on.

        Raises:
          OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{next(_COUNTER)}"
        self._file = (folder / name).open("wb", buffering=0)
        self._append(_event(0, _bytes(3, b"brain.Event:2")))
        self._append(_event(step, _bytes(7, _varint(1, 1))))  # session_log: START

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name. Raises OSError if there is no room."""
        each = (_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items())
        self._append(_event(step, _bytes(5, b"".join(each))))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Adds texts by name, which TensorBoard reads as Markdown. Raises OSError if there is no room."""
        of_texts = _bytes(9, _bytes(1, _bytes(1, b"text")))  # metadata: the plugin that shows them
        shape = _bytes(2, _bytes(2, _varint(1, 1)))
        values = (
            _bytes(1, f"{name}/text_summary".encode())
            + _bytes(8, _varint(1, _STRING) + shape + _bytes(8, text.encode()))
            + of_texts
            for name, text in texts.items()
        )
        self._append(_event(step, _bytes(5, b"".join(_bytes(1, value) for value in values))))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted, as these files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _event(step: int, what: bytes) -> bytes:
    return struct.pack("<Bd", 1 << 3 | 1, time.time()) + (_varint(2, step) if step else b"") + what


# ---- protocol buffers: a field is its number and kind, then its value ----


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value


def _number(value: int) -> bytes:
    """Seven bits at a time, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])

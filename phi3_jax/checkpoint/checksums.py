"""Checksums of tensors, by which files that we wrote tell that a byte of them has changed since.

CRC-32 is what zlib computes at 2.9 GB/s on one core: enough to tell damage, and no protection against intent.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_CHUNK = 1 << 24  # bytes; longer data is checked in as many pieces, by several threads
_THREADS = min(8, os.cpu_count() or 1)


def crc32(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes; of more than 16 MiB, that of the little-endian CRC-32s of each 16 MiB."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pieces = [data[start : start + _CHUNK].data for start in range(0, len(data), _CHUNK)]
    if len(pieces) <= 1:
        return zlib.crc32(data.data)
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets other threads run meanwhile
        return zlib.crc32(np.array(list(pool.map(zlib.crc32, pieces)), "<u4").tobytes())


def tensor_crc32(name: str, array: np.ndarray) -> int:
    """The CRC-32 of a tensor's bytes, and then of its name, dtype and shape: none of them can be exchanged unseen."""
    described = f"{name} {array.dtype.name} {list(array.shape)}"
    return zlib.crc32(described.encode(), crc32(array))


def changed(path: Path, what: str, removal: str) -> ValueError:
    """The error for a part of a file whose checksum is not the one that the file was written with.

    Args:
      removal: how the checksums of a file that was changed on purpose are removed.
    """
    return ValueError(
        f"{path}: the file is damaged: {what} is not what was written (its CRC-32 differs); write or download it "
        f"again; if a program has changed it on purpose, {removal}"
    )

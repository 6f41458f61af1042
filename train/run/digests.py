"""What was written into a folder, so that damage at rest is noticed: size and SHA-256 of each of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.atomic_write import sync
from phi3_jax.json_files import SETTINGS, read_bytes

from .. import fingerprint

_NAME = "digests.json"


def write_digests(folder: Path) -> None:
    """Writes them for all that is in the subfolders, which is then on the disk. Raises OSError."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.glob("*/**/*")) if path.is_file()}
    for path in files.values():
        sync(path)
    digests = fingerprint.of_files(files.values())
    found = {name: [path.stat().st_size, digest] for (name, path), digest in zip(files.items(), digests, strict=True)}
    content = {"files": found, "sha256": _of_entries(found)}
    (folder / _NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(folder / _NAME)


def has_digests(folder: Path) -> bool:
    """Whether there is something to compare with; earlier versions have not written it."""
    return (folder / _NAME).exists()


def check_digests(folder: Path, part: str = "") -> None:
    """Compares the files with what was written, if there are digests.

    Args:
      part: only those of this subfolder; "" are all.

    Raises:
      ValueError: a file is missing or differs; it is named.
      OSError: one cannot be read.
    """
    if not has_digests(folder):
        return
    expected = {name: each for name, each in _read(folder).items() if not part or name.startswith(f"{part}/")}
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, and was written with {size}")
    digests = fingerprint.of_files(folder / name for name in expected)
    if other := [name for name, digest in zip(expected, digests, strict=True) if digest != expected[name][1]]:
        raise ValueError(f"{other[0]} is not what was written: its SHA-256 is another")


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(folder / _NAME, SETTINGS))
        files = content["files"]
        is_whole = content["sha256"] == _of_entries(files)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{_NAME}, with the sums of the files, is damaged itself")
    return files


def _of_entries(files: Any) -> str:
    return fingerprint.of_text(json.dumps(files, sort_keys=True))

"""GGUF files in parts, as llama.cpp's gguf-split writes them: x-00001-of-00003.gguf and so on.

Each part is a GGUF file with some of the tensors; the first also has the metadata. The keys split.no (from 0),
split.count and split.tensors.count stand in all of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.gguf.header import GgufTensor, damaged, read_header
from phi3_jax.json_files import shown

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def read_headers(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata, and the tensors of all parts, of a file or of any part of one.

    Raises:
      FileNotFoundError: parts are missing.
      ValueError: a file is damaged, or the parts do not belong together.
    """
    metadata, table = read_header(path)
    no, count = (_number(path, metadata, key, default) for key, default in ((_NO, 0), (_COUNT, 1)))
    if count <= 1:
        return metadata, table
    match = _NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (no + 1, count):
        raise ValueError(
            f"{path}: one of {count} parts, by its header; give all of them their names again, this one "
            f"...-{no + 1:05d}-of-{count:05d}.gguf, so that the others are found"
        )
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if absent := [part.name for part in paths if not part.exists()]:
        some = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        raise FileNotFoundError(f"{path}: of its {count} parts, these are missing: {some}; download them beside it")
    tensors: dict[str, GgufTensor] = {}
    for i, part in enumerate(paths):
        keys, found = read_header(part)
        metadata = keys if i == 0 else metadata
        if (_number(part, keys, _NO, -1), _number(part, keys, _COUNT, -1)) != (i, count):
            raise ValueError(f"{part}: its header does not say that it is part {i + 1} of {count}; download it again")
        if twice := sorted(tensors.keys() & found.keys()):
            raise damaged(part, f"tensors {twice[:5]} are in another part, too")
        tensors |= found
    if (wanted := _number(paths[0], metadata, _TENSORS, len(tensors))) != len(tensors):
        raise damaged(path, f"its parts have {len(tensors)} tensors instead of {wanted}")
    return metadata, tensors


def named_as_part(path: Path) -> str | None:
    """ "part 2 of 3" if a file's name says so."""
    match = _NAME.fullmatch(path.name)
    return f"part {int(match[2])} of {int(match[3])}" if match else None


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder, or the first of its parts; None if there is none.

    Raises ValueError if there are several.
    """
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        match = _NAME.fullmatch(path.name)
        models.setdefault(f"{match[1]} of {match[3]}" if match else path.name, path)
    if len(models) > 1:
        some = ", ".join(path.name for path in list(models.values())[:8])
        raise ValueError(f"{folder}: there are {len(models)} GGUF models ({some}); name one of the files")
    return next(iter(models.values()), None)


def _number(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or value < min(default, 0):
        raise damaged(path, f"{key} is {shown(value)}")
    return value

"""What a run was made from, as short hashes of contents: a replaced file is noticed, a moved one is not.

Weights are hashed as they are in memory after loading, so that a change which training would not see (of a bit that is
cut off, of a file's layout) is none. SHA-256 of all bytes takes one core 1 s for a gigabyte, and all cores share it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.text import Tokenizer

_PIECE = 1 << 26  # bytes that are hashed at a time
_LETTERS = 16  # of a fingerprint: 64 bits


def of_weights(params: Any) -> str:
    """The fingerprint of a tree of arrays: their names, shapes, dtypes and bits."""
    whole = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for path, leaf in jax.tree.leaves_with_path(params):
            whole.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
            for digest in pool.map(_digest, _pieces(leaf)):
                whole.update(digest)
    return whole.hexdigest()[:_LETTERS]


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """The fingerprint of the vocabulary, and of the templates of chats."""
    parts = [
        tokenizer.pieces,
        [dataclasses.astuple(token) for token in tokenizer.added_tokens],
        [tokenizer.eos_id, tokenizer.add_bos, tokenizer.bos_id, tokenizer.opening],
        [tokenizer.chat_template, tokenizer.tool_chat_template],
    ]
    return of_text(json.dumps(parts))


def of_config(config: Phi3Config) -> str:
    """The fingerprint of a configuration; a field of a later version counts only where it is not its default."""
    fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return of_text(repr([(field.name, value) for field, value in fields if value != field.default]))


def of_files(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, in hexadecimal digits. Raises OSError."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(_of_file, paths))


def of_text(text: str) -> str:
    """The fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_LETTERS]


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """An array's rows, some at a time: accelerators' arrays are not copied to the host as a whole."""
    is_here = isinstance(leaf, np.ndarray) or jax.default_backend() == "cpu"
    rows = np.asarray(leaf) if is_here else leaf
    rows = rows.reshape(1) if rows.ndim == 0 else rows
    count = max(1, _PIECE // max(1, rows[:1].nbytes))
    for begin in range(0, len(rows), count):
        yield np.asarray(rows[begin : begin + count])


def _digest(piece: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(piece).view(np.uint8).data).digest()

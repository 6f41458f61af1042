"""What training reads: data in all its forms, the data that it has prepared, and its checkpoints."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from phi3_jax.train.data import prepare
from phi3_jax.train.run.checkpoints import Checkpoints
from phi3_jax.train.run.run_folder import check_contents, check_settings, describe, recorded_settings
from phi3_jax.train.settings import Settings

from ..reader import Read, Reader
from .parts import MESSAGES, digest, model

_SETTINGS = Settings(sequence_length=160)
_CHATS: list[dict[str, Any]] = [{"messages": MESSAGES[:3], "source": i} for i in range(4)]
_PAIRS = [{"prompt": f"{i} + {i} é", "completion": str(2 * i)} for i in range(6)]
_NAMES = ("chats.jsonl", "chats.json", "pairs.csv", "chats.parquet", "chats.jsonl.gz", "pairs.arrow", "texts.jsonl")


def _make_data(folder: Path, variant: int) -> None:
    path, lines = folder / _NAMES[variant], "".join(json.dumps(chat) + "\n" for chat in _CHATS)
    if path.name == "chats.jsonl":
        path.write_text(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif path.suffix == ".json":
        path.write_text(json.dumps(_CHATS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": f"é {i} " * i}) + "\n" for i in range(1, 7)))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(_PAIRS), path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_CHATS), path)
    else:
        table = pyarrow.Table.from_pylist(_PAIRS)
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)


def _read_data(folder: Path, variant: int) -> Read:
    read = _rows(folder / _NAMES[variant], folder / "prepared")
    return {"rows": read["weights"], "report": read["report"]}


def _rows(path: Path, prepared: Path) -> Read:
    tokenizer = model().tokenizer
    assert tokenizer is not None
    dataset = prepare(path, tokenizer, _SETTINGS, prepared)
    rows = dataset.rows(range(len(dataset)))
    return {"weights": digest(*jax.tree.leaves(rows)), "report": digest(dataset.report, dataset.fingerprint)}


# ---------------------------------------------------------------- the data that is prepared


def _make_prepared(folder: Path, _: int) -> None:
    _rows(_source(folder), folder)


def _read_prepared(folder: Path, _: int) -> Read:
    return _rows(_source(folder), folder)


def _source(folder: Path) -> Path:
    """The data, in a place of its own that stays: what was prepared is found by its name and time."""
    path = folder.parent.parent / "source.jsonl"
    if not path.exists():
        mine = path.with_name(f"source.{os.getpid()}")
        mine.write_text("".join(json.dumps(chat) + "\n" for chat in _CHATS))
        with contextlib.suppress(FileExistsError):  # another worker was faster
            os.link(mine, path)
        mine.unlink()
    return path


# ---------------------------------------------------------------- checkpoints

_STEPS = (2, 4)


def _state(step: int) -> Any:
    keys = jax.random.split(jax.random.key(step), 2)
    params = {"a": jax.random.normal(keys[0], (31, 3)), "b": jax.random.normal(keys[1], (7,), jnp.bfloat16)}
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
    return jnp.int32(step), params, optimizer.init({"a": params["a"]})


def _run() -> dict[str, Any]:
    about = describe(model(), "data", {})
    return recorded_settings(_SETTINGS, _SETTINGS) | about


def _make_checkpoints(folder: Path, _: int) -> None:
    with Checkpoints(folder / "checkpoints", 2, 1) as checkpoints:
        for step in _STEPS:
            checkpoints.save(step, _state(step), _run(), float(step))


def _read_checkpoints(folder: Path, _: int) -> Read:
    """As a run goes on: what is read must be one of the states that were saved, and an older one is told."""
    with Checkpoints(folder / "checkpoints", 2, 1) as checkpoints:
        recorded = checkpoints.about()
        check_settings(recorded, _SETTINGS, 0)
        notes = check_contents(recorded, describe(model(), "data", {}), _SETTINGS)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _state(0)
        )
        restored = checkpoints.restore(like)
    found, saved = (digest(*jax.tree.leaves(state)) for state in (restored.state, _state(restored.step)))
    read: Read = {"weights": "as saved" if found == saved else found, "notes": notes}
    return read | ({"told": list(restored.notes)} if restored.notes else {})


READERS = {
    "training data": Reader(_make_data, _read_data, len(_NAMES), cost=2, is_bounded=False),
    "prepared data": Reader(
        _make_prepared, _read_prepared, files={"*.bin": 2, "header.json": 4}, strict=("*/header.json",), checksums=True
    ),
    "training checkpoint": Reader(_make_checkpoints, _read_checkpoints, cost=4, checksums=True),
}

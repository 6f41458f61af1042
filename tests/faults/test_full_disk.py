"""Disks that fill while something is written: one clear line, nothing left behind, the old file whole.

Also quotas and limits of sizes, which tell a program so with a signal (SIGXFSZ) or an error of its own.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from batches import file_size_limit, read_only, small_disk
from checkpoints.adapters import random_adapter
from forked_programs import entries
from prefixes import ids, take_prefix
from templates import PHI4_MINI, small_tokenizer
from training_runs import CONFIG, write_data

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import atomic_write, save_adapter
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.infer.conversation import save_messages
from phi3_jax.infer.engine.prompt_cache import fingerprint
from phi3_jax.quantization import quantize_params
from phi3_jax.train.data import prepare
from phi3_jax.train.run.exports import replace_export
from phi3_jax.train.run.records import save_curve
from phi3_jax.train.run.run_folder import write_settings
from phi3_jax.train.settings import Settings

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]
ROOM = 20_000  # bytes, less than any of them writes
LORA = LoraConfig(rank=30, alpha=3)


@pytest.fixture(scope="module")
def writers(tmp_path_factory) -> dict[str, Callable[[Path], Any]]:
    """What writes: each takes the file or folder to write."""
    flat = dataclasses.replace(CONFIG, hidden_size=48, long_rope=None, sliding_window=None)
    model = phi3_jax.Checkpoint(flat, phi3_jax.random_params(flat), None, phi3_jax.GenerationSettings())
    integers = dataclasses.replace(model, params=quantize_params(model.params, "int8"))
    prefix = take_prefix(flat, model.params, ids(13, 60), 60, 64, dtype=jnp.float32)
    prefix = dataclasses.replace(prefix, fingerprint=fingerprint(model))
    adapter = random_adapter(flat, LORA)
    made = tmp_path_factory.mktemp("made")
    write_data(made / "train.jsonl", 900, 1)
    tokenizer = small_tokenizer(PHI4_MINI)

    def export(path: Path) -> None:
        replace_export(path, 6, lambda folder: save_adapter(folder, adapter, LORA, flat, "base"))

    def settings(path: Path) -> None:
        write_settings({"about": "x" * 2 * ROOM}, Settings(output=str(path)))

    return {
        "a model": lambda path: phi3_jax.save(model, path / "new"),
        "a model in shards": lambda path: phi3_jax.save(model, path / "new", 9_000),
        "a quantised model": lambda path: phi3_jax.save(integers, path / "new"),
        "GGUF": lambda path: save_gguf(model, path / "new", "f32"),
        "an adapter": lambda path: save_adapter(path / "new", adapter, LORA, flat, "base"),
        "an export": lambda path: export(path / "old_folder"),
        "a prompt cache": lambda path: prefix.save(path / "old"),
        "a conversation": lambda path: save_messages(path / "new", [{"role": "user", "content": "a" * 2 * ROOM}]),
        "prepared data": lambda path: prepare(made / "train.jsonl", tokenizer, Settings(), path / "data"),
        "a curve": lambda path: save_curve([{"step": 0, "loss": 1.0}], path / "old", "title"),
        "settings": settings,
    }


NAMES = [
    "a model", "a model in shards", "a quantised model", "GGUF", "an adapter", "an export", "a prompt cache",
    "a conversation", "prepared data", "a curve", "settings",
]  # fmt: skip


@pytest.fixture
def _unsuspecting(monkeypatch):
    """The room is not asked for before writing: others fill it meanwhile."""
    monkeypatch.setattr(atomic_write, "_require_room", lambda *_: None)


def write_old(folder: Path) -> None:
    (folder / "old").write_text("as it was")
    (folder / "settings.json").write_text("as it was")
    (folder / "old_folder").mkdir()
    (folder / "old_folder" / "a").write_text("as it was")


def require_one_line(folder: Path, write: Callable[[Path], Any], reason: str) -> None:
    before = entries(folder)
    with pytest.raises(OSError, match=rf"^{folder}[^\n]*{reason}[^\n]*$"):
        write(folder)
    left = {name for name in entries(folder) if not name.startswith("data")}
    assert left == before
    for name in ("old", "settings.json", "old_folder/a"):
        assert (folder / name).read_text() == "as it was"
    assert not [name for name in entries(folder) if name.endswith(("partial", "new", "lock")) and "/." in f"/{name}"]


@pytest.mark.usefixtures("_unsuspecting")
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full_in_mid_write(writers, tmp_path, name):
    with small_disk(tmp_path / "disk", 400_000) as disk:
        write_old(disk)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - ROOM))
        require_one_line(disk, writers[name], "(No space left|the disk full)")
        (disk / "filler").unlink()
        writers[name](disk)  # and now there is room


@pytest.mark.usefixtures("_unsuspecting")
@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(writers, tmp_path, name):
    write_old(tmp_path)
    with file_size_limit(ROOM // 4):
        require_one_line(tmp_path, writers[name], "(File too large|the disk full)")


@pytest.mark.parametrize("name", NAMES)
def test_folders_that_may_not_be_written(writers, tmp_path, name):
    (tmp_path / "fixed").mkdir()
    with (
        read_only(tmp_path / "fixed"),
        pytest.raises(OSError, match=r"Read-only|Permission denied") as caught,
    ):
        writers[name](tmp_path / "fixed")
    assert f"{tmp_path}/fixed/" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_where_a_folder_belongs(writers, tmp_path, name):
    (tmp_path / "file").write_text("as it was")
    with pytest.raises(OSError, match=rf"{tmp_path}/file[^\n]*$"):
        writers[name](tmp_path / "file")
    assert entries(tmp_path) == {"file"}

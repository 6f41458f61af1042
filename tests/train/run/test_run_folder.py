"""What a run is known by, and exports that are replaced: as a whole, or not at all."""

import dataclasses
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from templates import PHI4_MINI, small_tokenizer
from training_runs import CONFIG

import phi3_jax
from phi3_jax.adapters import LoraConfig, adapter_shapes
from phi3_jax.checkpoint import save_adapter
from phi3_jax.train import fingerprint
from phi3_jax.train.adapters import fingerprints
from phi3_jax.train.run import exports
from phi3_jax.train.run.exports import (
    best_folder,
    disown_exports_after,
    export_folder,
    exported_step,
    is_exported,
    remove_export,
    replace_export,
    settle_exports,
)
from phi3_jax.train.run.run_folder import check_contents, describe
from phi3_jax.train.settings import Settings


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8])
def test_weights_are_known_by_every_bit(dtype, monkeypatch):
    rows = np.arange(7 * 5).reshape(7, 5) % 11
    one = {"a": jnp.asarray(rows, dtype), "b": jnp.asarray(3, dtype)}
    first = fingerprint.of_weights(one)
    assert fingerprint.of_weights({"b": jnp.asarray(3, dtype), "a": np.asarray(one["a"])}) == first
    others = [
        {"a": one["a"].at[6, 4].add(1), "b": one["b"]},
        {"a": one["a"], "b": one["b"] + 1},
        {"a": one["a"][::-1], "b": one["b"]},  # the same numbers at other places
        {"a": one["a"].reshape(5, 7), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
    ]
    assert len({first, *map(fingerprint.of_weights, others)}) == 6
    if dtype in (jnp.float32, jnp.bfloat16):
        zeros = {"a": jnp.zeros(3, dtype)}
        assert fingerprint.of_weights(zeros) != fingerprint.of_weights({"a": -zeros["a"]})  # of the sign alone
    # In pieces of three rows, too.
    monkeypatch.setattr(fingerprint, "_PIECE", 15 * rows.astype(dtype).itemsize)
    pieces = {fingerprint.of_weights(each) for each in (one, *others)}
    assert len(pieces) == 6
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # arrays that are fetched piece by piece
    assert {fingerprint.of_weights(each) for each in (one, *others)} == pieces


def test_what_differs_is_told_by_name():
    settings = Settings(checkpoint="base", train_file="texts.jsonl", output="run")
    weight = jnp.ones(24)
    params = {"norm": {"weight": weight}}
    checkpoint = phi3_jax.Checkpoint(CONFIG, params, small_tokenizer(PHI4_MINI), phi3_jax.GenerationSettings((257,)))
    recorded = describe(checkpoint, "rows", {})
    assert check_contents(None, recorded, settings) == []
    assert check_contents(recorded, recorded, settings) == []
    changed = {
        "the weights of base": {"params": {"norm": {"weight": weight.at[23].set(1 + 2**-23)}}},
        "the configuration of base": {"config": dataclasses.replace(CONFIG, sliding_window=18)},
        "the tokenizer or chat template of base": {"tokenizer": small_tokenizer(PHI4_MINI + " ")},
    }
    for told, change in changed.items():
        now = describe(dataclasses.replace(checkpoint, **change), "rows", {})
        with pytest.raises(ValueError, match=rf"^run: not what they were when the run there began are {told}: go on"):
            check_contents(recorded, now, settings)
    everything = {name: value for change in changed.values() for name, value in change.items()}
    now = describe(dataclasses.replace(checkpoint, **everything), "others", {})
    told = "; ".join(["the rows of texts.jsonl", *changed])
    with pytest.raises(ValueError, match=rf" are {told}: go on"):
        check_contents(recorded, now, settings)
    # Another machine is no other run; and what an earlier version did not record is not compared.
    other = {**recorded, "versions": {**recorded["versions"], "jax": "0.1", "device": "8 x abacus"}}
    (note,) = check_contents(other, recorded, settings)
    assert note.startswith("jax 0.1 before, ")
    assert "; device 8 x abacus before, " in note
    (note,) = check_contents({"data": "rows"}, recorded, settings)
    assert note.endswith(f"was not compared: {'; '.join(changed)}")


def test_adapters_are_known_by_contents(tmp_path):
    checkpoint = phi3_jax.Checkpoint(CONFIG, {}, small_tokenizer(PHI4_MINI), phi3_jax.GenerationSettings((257,)))
    settings = Settings(init_adapter=str(tmp_path / "a"), method="dpo", pack=False, dpo_reference=str(tmp_path / "b"))

    def save(name: str, lora: LoraConfig, change: float = 0.0) -> None:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        leaves = {path: np.full(shape, 0.5, np.float32) for path, shape in adapter_shapes(CONFIG, lora).items()}
        leaves["layers/self_attn/o_proj/b"][2, 23, 1] += change
        save_adapter(tmp_path / name, flax.traverse_util.unflatten_dict(leaves, sep="/"), lora, CONFIG, "")

    lora = LoraConfig(2, 4.0, ("o_proj",))
    for name in "ab":
        save(name, lora)
    recorded = describe(checkpoint, "rows", fingerprints(settings))
    save("a", lora)
    assert describe(checkpoint, "rows", fingerprints(settings)) == recorded
    for name, told, changed in (
        ("a", "init_adapter", (lora, 2**-24)),
        ("a", "init_adapter", (dataclasses.replace(lora, alpha=5.0), 0.0)),
        ("b", "dpo_reference", (lora, -1.0)),
    ):
        save(name, *changed)
        with pytest.raises(ValueError, match=rf"began are {told} {tmp_path}/{name}: go on"):
            check_contents(recorded, describe(checkpoint, "rows", fingerprints(settings)), settings)
        save(name, lora)


def write(text: str, folder: Path) -> None:
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(text)


def contents(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in "ab"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["half written", "written", "old one moved", "new one moved", "half removed"])
def test_a_kill_while_an_export_is_replaced(tmp_path, monkeypatch, moment):
    settings = Settings(output=str(tmp_path))
    folder = export_folder(settings)
    replace_export(folder, 6, lambda place: write("old", place))
    rename, rmtree = Path.rename, shutil.rmtree

    def killed_rename(self: Path, target: Path) -> Path:
        is_new = self.suffix == ".new"
        if moment == "written" or (moment == "old one moved" and is_new):
            raise Killed
        moved = rename(self, target)
        if moment == "new one moved" and is_new:
            raise Killed
        return moved

    def killed_rmtree(path: Path, **_: object) -> None:
        if moment == "half removed" and path.exists():
            (path / "a").unlink()
            raise Killed
        rmtree(path, ignore_errors=True)

    def killed_write(place: Path) -> None:
        write("new", place)
        if moment == "half written":
            (place / "b").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(exports, "exchange", lambda *_: False)  # as on file systems that do not know it
        patch.setattr(Path, "rename", killed_rename)
        patch.setattr(shutil, "rmtree", killed_rmtree)
        with pytest.raises(Killed):
            replace_export(folder, 10, killed_write)
    # What has the name is whole, already before the next start.
    assert not folder.exists() or len(contents(folder)) == 1
    settle_exports(settings)
    is_new = moment in ("new one moved", "half removed")
    assert (contents(folder), exported_step(folder)) == (({"new"}, 10) if is_new else ({"old"}, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    replace_export(folder, 10, lambda place: write("new", place))
    assert (contents(folder), exported_step(folder)) == ({"new"}, 10)


@pytest.mark.parametrize("moment", ["before", "after", "half removed"])
def test_who_reads_an_export_always_finds_one(tmp_path, monkeypatch, moment):
    settings = Settings(output=str(tmp_path))
    folder = export_folder(settings)
    replace_export(folder, 6, lambda place: write("old", place))
    exchange, rmtree = exports.exchange, shutil.rmtree

    def killed_exchange(new: Path, old: Path) -> bool:
        assert contents(old) == {"old"}
        if moment == "before":
            raise Killed
        assert exchange(new, old)
        assert (contents(new), contents(old)) == ({"old"}, {"new"})
        if moment == "after":
            raise Killed
        return True

    def killed_rmtree(path: Path, **_: object) -> None:
        if path.exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(exports, "exchange", killed_exchange)
        patch.setattr(shutil, "rmtree", killed_rmtree)
        with pytest.raises(Killed):
            replace_export(folder, 10, lambda place: write("new", place))
    settle_exports(settings)
    expected = ({"old"}, 6) if moment == "before" else ({"new"}, 10)
    assert (contents(folder), exported_step(folder)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    rmtree(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": Infinity}', b'{"step": "x"}', b"[" * 100_000, b'{"step": 6, "files": 3}', b"\xff"]
)
def test_a_damaged_note_on_an_export_is_as_none(tmp_path, content):
    (tmp_path / "training.json").write_bytes(content)
    assert exported_step(tmp_path) is None


def test_what_is_exported_already(tmp_path):
    settings = Settings(output=str(tmp_path), train="all")
    last, best = export_folder(settings), best_folder(settings)
    assert not is_exported(settings, 6, None)
    replace_export(last, 6, lambda place: write("last", place))
    assert [is_exported(settings, *each) for each in ((6, None), (6, 6), (6, 4), (7, None))] == [
        True,
        True,
        False,
        False,
    ]
    replace_export(best, 4, lambda place: write("best", place))
    assert [is_exported(settings, *each) for each in ((6, None), (6, 6), (6, 4), (6, 5))] == [True, True, True, False]
    disown_exports_after(5, settings)  # step 6 is taken again
    assert (exported_step(last), exported_step(best), contents(last)) == (None, 4, {"last"})
    remove_export(best)
    remove_export(best)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (last / "training.json").write_text("{}")
    assert exported_step(last) is None

"""Checkpoints: which ones stay, that they are what was saved, and that broken ones are never taken."""

import gc
import json
import shutil
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import read_only, small_disk

from phi3_jax.train.run import digests
from phi3_jax.train.run.checkpoints import Checkpoints

# When a file cannot be read, Orbax leaves others' reading behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
RUN = {"settings": {"lr": 1e-4, "lora_targets": ["a", "b"]}, "data": "x"}


def make_state(seed: int) -> Any:
    """Some of all that a training state has: nested tuples with empty ones, dtypes, scalars."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "x": jax.random.normal(keys[0], (31, 3)),
        "y": {"z": jax.random.normal(keys[1], (7,), jnp.bfloat16), "q": jax.random.bits(keys[2], (5, 2), jnp.uint8)},
    }
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1.0))
    return jnp.int32(seed), params, optimizer.init({"x": params["x"]})


def like(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def equal(one: Any, other: Any) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in leaves)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints 3 (the best), 5 and 6."""
    with Checkpoints(tmp_path / "kept", keep_last=2, keep_best=1) as checkpoints:
        for step, loss in ((1, 3.0), (3, 1.0), (4, None), (5, 2.0), (6, float("nan"))):
            checkpoints.save(step, make_state(step), RUN, loss)
    return tmp_path / "kept"


@pytest.fixture
def _settled() -> Iterator[None]:
    """What was left behind ends here, and not in another test."""
    yield
    time.sleep(0.1)
    gc.collect()


def test_the_last_and_the_best_stay(saved):
    assert names(saved) == {"3", "5", "6"}
    with Checkpoints(saved, 2, 2) as checkpoints:  # which knows the losses of before
        assert checkpoints.steps == [3, 5, 6]
        # The two best have 1 and 2.
        assert [checkpoints.is_among_best(loss) for loss in (0.5, 1.5, 2.0, float("nan"), float("inf"))] == [
            True, True, False, False, False,
        ]  # fmt: skip
        for step, loss in ((7, 1.5), (8, 9.0), (9, None)):
            checkpoints.save(step, make_state(step), RUN, loss)
    assert names(saved) == {"3", "7", "8", "9"}
    with Checkpoints(saved, 1, 0) as checkpoints:
        assert not checkpoints.is_among_best(0.0)
        checkpoints.save(10, make_state(10), RUN, 0.0)
    assert names(saved) == {"10"}


def test_losses_on_other_held_out_data_do_not_compete(tmp_path):
    folder = tmp_path / "kept"
    with Checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        assert checkpoints.compare_on("first") == []
        for step, loss in ((1, 1.0), (2, 3.0)):
            checkpoints.save(step, make_state(step), RUN, loss)
    with Checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        assert checkpoints.best == 1
        assert checkpoints.compare_on("second") == [1, 2]
        assert (checkpoints.best, checkpoints.is_among_best(9.0)) == (None, True)
        for step, loss in ((3, 5.0), (4, 6.0)):
            checkpoints.save(step, make_state(step), RUN, loss)
        assert checkpoints.best == 3
    assert names(folder) == {"3", "4"}
    # What is saved in the place of another checkpoint has a loss of its own, or none.
    with Checkpoints(folder, keep_last=2, keep_best=1) as checkpoints:
        shutil.rmtree(folder / "3")
        checkpoints.restore(like(make_state(0)))
        checkpoints.save(5, make_state(5), RUN, float("nan"))
        checkpoints.save(6, make_state(6), RUN, float("-inf"))
        assert checkpoints.best == 4


def test_what_is_restored_is_what_was_saved(saved):
    with Checkpoints(saved, 2, 1) as checkpoints:
        assert checkpoints.about() == RUN
        restored = checkpoints.restore(like(make_state(0)))
    assert (restored.step, restored.notes) == (6, ())
    assert equal(restored.state, make_state(6))


def test_the_state_may_be_used_up_while_it_is_written(tmp_path):
    add_one = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"x": jax.random.normal(jax.random.key(0), (1500, 1500))}
    expected = []
    with Checkpoints(tmp_path / "kept", 3, 0) as checkpoints:
        for step in range(3):
            expected.append(np.array(state["x"]))
            checkpoints.save(step, state, RUN)
            state = add_one(add_one(state))
    for step in (2, 1, 0):
        with Checkpoints(tmp_path / "kept", 3, 0) as checkpoints:
            restored = checkpoints.restore(like(state))
        assert restored.step == step
        np.testing.assert_array_equal(restored.state["x"], expected[step])
        shutil.rmtree(tmp_path / "kept" / str(step))


def test_remains_of_saves_and_removals_vanish(saved):
    shutil.copytree(saved / "6", saved / "7.orbax-checkpoint-tmp")
    shutil.copytree(saved / "5", saved / "removed" / "4")
    (saved / "removed" / "4" / "about" / "metadata").unlink()
    with Checkpoints(saved, 2, 1) as checkpoints:
        assert checkpoints.steps == [3, 5, 6]
        checkpoints.save(7, make_state(7), RUN)
    assert names(saved) == {"3", "6", "7"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_data(checkpoint: Path) -> None:
    cut(
        max(
            (path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
    )


def damage_metadata(checkpoint: Path) -> None:
    cut(checkpoint / "state" / "_METADATA")


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "state" / "manifest.ocdbt").unlink()


def remove_state(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize("damage", [damage_data, damage_metadata, remove_manifest, remove_state])
def test_a_checkpoint_that_cannot_be_read_is_not_taken(saved, damage):
    damage(saved / "6")
    with Checkpoints(saved, 2, 1) as checkpoints:
        restored = checkpoints.restore(like(make_state(0)))
        assert restored.step == 5
        assert equal(restored.state, make_state(5))
        (text,) = restored.notes
        assert text.startswith("checkpoint 6 cannot be read: ")
        assert text.endswith("; 5 is taken instead, and that is now unreadable-6")
        assert "\n" not in text
        assert len(text) < 400
        assert checkpoints.steps == [3, 5]
        checkpoints.save(6, make_state(16), RUN)
    assert names(saved) == {"3", "5", "6", "unreadable-6"}
    with Checkpoints(saved, 2, 1) as checkpoints:
        assert equal(checkpoints.restore(like(make_state(0))).state, make_state(16))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << 6
    path.write_bytes(content)


def test_no_flipped_bit_is_restored(tmp_path):
    folder, states = tmp_path / "kept", {}
    with Checkpoints(folder, 2, 0) as checkpoints:
        for step in (5, 6):
            key = jax.random.key(step)
            states[step] = {"x": jax.random.normal(key, (50, 31)), "moment": jax.random.normal(key, (50, 31)) * 1e-6}
            checkpoints.save(step, states[step], RUN)
    files = [path for path in sorted((folder / "6").glob("*/**/*")) if path.is_file()]
    assert any(path.stat().st_size > 4000 for path in files)  # Orbax has no checksums of arrays
    for path in [*files, folder / "6" / "digests.json"]:
        before = path.read_bytes()
        flip(path, len(before) // 2)
        with Checkpoints(folder, 2, 0) as checkpoints:
            assert checkpoints.about() == RUN  # that of the older one, if this one's is damaged
            with pytest.raises(ValueError, match=r"^checkpoint 6 cannot be read: .*(its SHA-256 is|damaged)"):
                checkpoints.read(6, like(states[6]))
        path.write_bytes(before)
    with Checkpoints(folder, 2, 0) as checkpoints:
        restored = checkpoints.restore(like(states[6]))
    assert (restored.step, restored.notes, equal(restored.state, states[6])) == (6, (), True)
    # What an earlier version wrote cannot be checked, which is told.
    (folder / "6" / "digests.json").unlink()
    with Checkpoints(folder, 2, 0) as checkpoints:
        (note,) = checkpoints.restore(like(states[6])).notes
    assert note == "checkpoint 6 is of an earlier version, without checksums: it is taken as it is"


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize("change", [("commit_", "commitx"), (":", ";"), ("1", "true")])
def test_damaged_times_cost_nothing(saved, change):
    """Orbax reads them when it decides what to keep, in the middle of a run."""
    for path in saved.glob("*/_CHECKPOINT_METADATA"):
        path.write_text(path.read_text().replace(*change))
    with Checkpoints(saved, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.restore(like(make_state(6))).step == 6
        checkpoints.save(7, make_state(7), RUN)
        checkpoints.save(8, make_state(8), RUN)
    with Checkpoints(saved, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.steps == [3, 7, 8]


def test_nothing_is_set_aside_where_nothing_can_be_read(saved):
    for step in (3, 5, 6):
        remove_manifest(saved / str(step))
    with (
        Checkpoints(saved, 2, 1) as checkpoints,
        pytest.raises(ValueError, match=r"kept: none of the checkpoints 3, 5, 6 can be read .*name another output"),
    ):
        checkpoints.restore(like(make_state(0)))
    assert names(saved) == {"3", "5", "6"}


@pytest.mark.usefixtures("_settled")
def test_what_a_run_is_known_by_is_read_from_an_older_one_if_need_be(saved):
    cut(saved / "6" / "about" / "metadata")
    with Checkpoints(saved, 2, 1) as checkpoints:
        assert checkpoints.about() == RUN
    for step in (3, 5):
        (saved / str(step) / "about" / "metadata").write_text(json.dumps({}) if step == 3 else "")
    with Checkpoints(saved, 2, 1) as checkpoints, pytest.raises(ValueError, match="none of the checkpoints"):
        checkpoints.about()
    with Checkpoints(saved.parent / "empty", 2, 1) as checkpoints:
        assert checkpoints.about() is None


def save_five(folder: Path, state: Any) -> None:
    with Checkpoints(folder, 9, 0) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state, RUN)


def require_two(folder: Path, state: Any) -> None:
    with Checkpoints(folder, 9, 0) as checkpoints:
        restored = checkpoints.restore(like(state))
    assert names(folder) == {"0", "1"}
    assert (restored.step, equal(restored.state, state)) == (1, True)


def test_a_full_disk_is_one_error_and_spares_what_was_there(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (500, 500))}  # a megabyte
    with small_disk(tmp_path / "disk", 3_600_000) as disk:
        message = r"up to 10 more checkpoints of 0\.002 GB, and 0\.004 GB are free; make room"
        with Checkpoints(disk / "kept", 9, 0) as checkpoints, pytest.raises(OSError, match=message):
            checkpoints.require_room(like(state))
        message = r"kept: a checkpoint could not be written \(it takes 0\.002 GB, and .*; when that is mended"
        with pytest.raises(OSError, match=message):
            save_five(disk / "kept", state)
        require_two(disk / "kept", state)


# The thread that fails is asked for its fault.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("_settled")
def test_a_disk_that_others_fill_meanwhile(tmp_path, monkeypatch):
    state = {"x": jax.random.normal(jax.random.key(0), (500, 500))}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    with small_disk(tmp_path / "disk", 2_500_000) as disk:
        message = r"kept: a checkpoint could not be written \([^\n]*\); when that is mended[^\n]*$"
        with pytest.raises(OSError, match=message):
            save_five(disk / "kept", state)
        require_two(disk / "kept", state)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "fixed").mkdir()
    with read_only(tmp_path / "fixed"), pytest.raises(OSError, match="a checkpoint could not be written"):
        Checkpoints(tmp_path / "fixed" / "kept", 1, 1)


def test_sums_of_files_that_were_changed_themselves_are_told(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a").write_bytes(b"1")
    (tmp_path / "state" / "b").write_bytes(b"2")
    digests.write_digests(tmp_path)
    digests.check_digests(tmp_path)
    content = json.loads((tmp_path / "digests.json").read_text())
    del content["files"]["state/b"]
    (tmp_path / "digests.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"digests\.json, with the sums of the files, is damaged itself"):
        digests.check_digests(tmp_path)

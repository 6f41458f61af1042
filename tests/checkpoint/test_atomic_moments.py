"""Kills at every moment of writing, several processes, and what may stand in the way."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_jax.checkpoint.atomic_write as atomic_write
from phi3_jax.checkpoint.atomic_write import new_file, new_folder, remove_partials, reserved

# A process without jax, which may fork. Its children end before their k-th call of the system, for every k.
MOMENTS = """
import importlib.util, os, shutil, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic_write", sys.argv[1])
writing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writing)
os.fsync = lambda file: None  # it takes milliseconds, and nothing for kills
target = Path(sys.argv[2])

def new_file(word):
    with writing.new_file(target, overwrite=target.exists()) as partial:
        Path(f"{partial}.beside").write_text("a writer's own scratch file")
        partial.write_text(word * 1000)

def new_folder(word):
    with writing.reserved(target), writing.new_folder(target, 10) as partial:
        for name in "ab":
            (partial / name).write_text(word * 1000)
        (partial / "c").mkdir()

def found():
    if target.is_dir():
        files = [(target / name).read_text() for name in "ab"] if len(os.listdir(target)) == 3 else ["half"]
        return files[0] if files[0] == files[1] else "half"
    return target.read_text() if target.exists() else ""

def killed(write, moment):
    count = 0
    def on_call(frame, event, argument):
        nonlocal count
        if event == "c_call" and argument.__module__ in ("posix", "fcntl", "_io"):
            count += 1
            if count == moment:
                os._exit(9)
    child = os.fork()
    if not child:
        sys.setprofile(on_call)
        write("new")
        sys.setprofile(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

write, old = globals()[sys.argv[3]], sys.argv[4] == "old"
outcomes, moment = [], 1
while True:
    if old:
        write("old")
    was_killed = killed(write, moment)
    outcomes.append(found())
    if not was_killed:
        break
    if write is new_file or outcomes[-1] == "":
        write("again")
    else:
        writing.remove_partials(target.parent)
    assert os.listdir(target.parent) == [target.name], (moment, os.listdir(target.parent))
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    moment += int(sys.argv[5])
known = ["old" * 1000 if old else "", "new" * 1000]
assert [each for each in outcomes if each not in known] == []
assert outcomes == sorted(outcomes, key=known.index), "it appears once"
print(moment)
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize(("kind", "before"), [("new_file", "old"), ("new_folder", "nothing")])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_the_next_writer_nothing_else(tmp_path, kind, before, step):
    command = [sys.executable, "-c", MOMENTS, atomic_write.__file__, str(tmp_path / "out" / "name"), kind, before]
    command += [str(step)]
    (tmp_path / "out").mkdir()
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 30  # moments


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr(atomic_write, "_PATIENCE", 0.05)


HOLDER = """
import sys
from pathlib import Path
from phi3_jax.checkpoint.atomic_write import new_file
with new_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("_impatient")
def test_a_second_writer_is_refused_at_once_and_what_lives_is_not_removed(tmp_path):
    path = tmp_path / "model"
    command = [sys.executable, "-c", HOLDER.replace("phi3_jax.checkpoint.", ""), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(atomic_write.__file__).parent)}  # it needs no jax
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"writing\n"
        for context in (new_file(path), new_folder(path, 0), reserved(path)):
            with pytest.raises(OSError, match=rf"model: process {holder.pid} on \S+ is writing it; wait"), context:
                pass
        (partial,) = tmp_path.iterdir()
        with new_file(tmp_path / "other") as other:
            other.write_text("")
        remove_partials(tmp_path)
        assert (partial / "new").read_text() == "half"
        holder.kill()
    # Another target in this folder, by any program.
    with new_folder(tmp_path / "third", 0):
        pass
    assert sorted(os.listdir(tmp_path)) == ["other", "third"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_without_locks_is_written_to_and_what_may_live_there_is_not_removed(tmp_path, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_file(tmp_path / "model", overwrite=True) as partial:
        partial.write_text("whole")
        # Also where it would wait for one who has the lock.
        other = new_file(tmp_path / "model", overwrite=True)
        with pytest.raises(OSError, match=rf"\.partial: of process {os.getpid()} on .*remove that folder"), other:
            pass
    with new_folder(tmp_path / "left", 0), reserved(tmp_path / "another"):
        assert len(os.listdir(tmp_path)) == 3  # of the two, and the file
    assert sorted(os.listdir(tmp_path)) == ["left", "model"]
    assert (tmp_path / "model").read_text() == "whole"


@pytest.mark.usefixtures("_impatient")
def test_what_is_reserved_is_written_only_by_who_has_reserved_it(tmp_path):
    path = tmp_path / "sub" / "model"
    with reserved(path):
        with pytest.raises(OSError, match=f"model: process {os.getpid()} on"), reserved(path):
            pass
        with pytest.raises(ZeroDivisionError), new_folder(path, 0) as partial:  # noqa: PT012
            (partial / "a").write_text("")
            raise ZeroDivisionError
        with new_folder(path, 0) as partial:
            assert not list(partial.iterdir())
            with pytest.raises(OSError, match="is writing it"), new_file(path):  # reserved for one at a time
                pass
        # Its OSErrors stay what they are.
        with pytest.raises(OSError, match=r"^of the model"), reserved(tmp_path / "b"):
            raise OSError("of the model")
    assert os.listdir(tmp_path / "sub") == ["model"]
    assert os.listdir(tmp_path) == ["sub"]


def test_work_of_another_machine_is_left_alone(tmp_path, monkeypatch):
    for machine, node in (("00000000", "elsewhere"), ("11111111", os.uname().nodename)):
        monkeypatch.setattr(atomic_write, "_machine", lambda machine=machine: machine)
        partial = tmp_path / f".a.{machine}.partial"
        partial.mkdir()
        (partial / "lock").write_text(f"17 {node}\n")
        (partial / "new").write_text("half")
    monkeypatch.undo()
    (tmp_path / ".notes.partial").mkdir()  # of other programs
    (tmp_path / ".notes.12345678.partial").write_text("")
    (tmp_path / ".a-abcdefgh").write_text("")
    with new_file(tmp_path / "a") as partial:
        partial.write_text("")
    # The second is of this machine before it was started again.
    assert sorted(os.listdir(tmp_path)) == [
        ".a-abcdefgh", ".a.00000000.partial", ".notes.12345678.partial", ".notes.partial", "a",
    ]  # fmt: skip


@pytest.mark.parametrize("appears", ["an empty folder", "a full folder", "a file", "a link to nowhere"])
@pytest.mark.parametrize("has_renameat2", [True, False])
def test_nothing_is_replaced_that_appears_meanwhile(tmp_path, monkeypatch, appears, has_renameat2):
    if not has_renameat2:
        monkeypatch.setattr(atomic_write.ctypes, "CDLL", lambda *_, **__: object())
    for kind in (new_file, new_folder):
        path = tmp_path / kind.__name__
        with pytest.raises(FileExistsError, match=f"{kind.__name__}: exists"), kind(path, 0) as partial:  # noqa: PT012
            (partial if partial.is_file() else partial / "a").write_text("new")
            if "folder" in appears:
                path.mkdir()
                if "full" in appears:
                    (path / "theirs").write_text("")
            elif "file" in appears:
                path.write_text("theirs")
            else:
                path.symlink_to("nowhere")
        assert path.is_symlink() or path.is_file() or os.listdir(path) == (["theirs"] if "full" in appears else [])
    assert sorted(os.listdir(tmp_path)) == ["new_file", "new_folder"]


def test_what_is_open_or_mapped_is_replaced_and_not_changed(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        with new_file(path, overwrite=True) as partial:
            partial.write_text("new and longer")
        assert (reader.read(), path.read_text()) == ("old", "new and longer")


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    said, sync, rename = [], os.fsync, atomic_write.rename_new

    def note_rename(new, target):
        said.append("rename")
        rename(new, target)

    def note_sync(file):
        said.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        sync(file)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(atomic_write, "rename_new", note_rename)
    with new_folder(tmp_path / "folder", 0) as partial:
        (partial / "inner").mkdir()
        for name in ("a", "inner/b"):
            (partial / name).write_text("")
    assert said == ["b", "inner", "a", "new", "rename", tmp_path.name]
    said.clear()
    with new_file(tmp_path / "file") as partial:
        partial.write_text("")
    assert said == ["new", "rename", tmp_path.name]


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_places_that_cannot_be_written_give_one_line(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^\S+file/x: cannot be written \((Not a directory|File exists)\); name"):
        kind(tmp_path / "file" / "x", 0).__enter__()
    if kind is new_file:
        with pytest.raises(OSError, match=r"cannot be written \(Is a directory\)"):
            new_file(tmp_path, overwrite=True).__enter__()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Denied")))
    with pytest.raises(OSError, match=r"^\S+/x: cannot be written \(Denied\); name"):
        kind(tmp_path / "x", 0).__enter__()
    assert os.listdir(tmp_path) == ["file"]

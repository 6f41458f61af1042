"""Compiled kernels in the cache: a damaged or planted library never runs, and is made again."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_compiler import fake_compiler as fake_compiler  # fixtures
from fake_compiler import small_libraries as small_libraries

from phi3_jax.kernels import Unavailable
from phi3_jax.kernels.native import build, compiler, stored

BUILD = (
    "import sys, pathlib; from phi3_jax.kernels.native import build, compiler;"
    "compiler.SOURCES = pathlib.Path(sys.argv[1]); print(build._build())"
)
# What a library may have become; planted is one that writes a file when it is loaded.
CONTENTS = {
    "empty": lambda whole, planted: b"",
    "one byte": lambda whole, planted: whole[:1],
    "its header": lambda whole, planted: whole[:64],
    "one page": lambda whole, planted: whole[:4096],
    "half": lambda whole, planted: whole[: len(whole) // 2],
    "all but one byte": lambda whole, planted: whole[:-1],
    "one byte more": lambda whole, planted: whole + b"\0",
    "one bit": lambda whole, planted: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    "zeros at the end": lambda whole, planted: whole[:4096] + bytes(len(whole) - 4096),
    "text": lambda whole, planted: b"no library\n",
    "planted": lambda whole, planted: planted,
    "planted, of the same size": lambda whole, planted: planted.ljust(len(whole), b"\0")[: len(whole)],
}
# What a record may have become.
RECORDS = {
    "none": None,
    "empty": b"",
    "half": b'{"size": 1',
    "a list": b"[1, 2]",
    "no hash": b'{"size": 1}',
    "edited": b'{"size": 15000, "sha256": "0000"}',
    "nested": b"[" * 900,
    "long": b" " * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A library that writes a file when it is loaded, and the file."""
    folder = tmp_path_factory.mktemp("planted")
    mark = folder / "it ran"
    source = folder / "planted.cpp"
    source.write_text(f"""#include <cstdio>
__attribute__((constructor)) static void run() {{ std::fclose(std::fopen("{mark}", "w")); }}
extern "C" const char* phi3_best_isa() {{ return "portable"; }}
extern "C" int phi3_supports_isa(const char*) {{ return 1; }}
""")
    compiler.compile_library(compiler.find(), [source], (), folder / "planted.so")
    return (folder / "planted.so").read_bytes(), mark


def made_again(library, whole, fake, capsys):
    capsys.readouterr()
    fake.calls()
    build._build()
    assert library.read_bytes() == whole
    assert stored.problem(library) is None
    assert fake.calls() == 2  # it alone was compiled, and linked
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{library} " in error
    assert error.endswith(": compiling it again\n")
    assert build._build().exists()
    assert fake.calls() == 0


@pytest.mark.parametrize("name", ["isa.so", "portable.so"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_library_that_is_not_what_was_compiled_never_runs(content, name, fake_compiler, planted, capsys):
    library = build._build().with_name(name)
    whole = library.read_bytes()
    library.unlink()  # the file may be mapped into this process
    library.write_bytes(CONTENTS[content](whole, planted[0]))
    made_again(library, whole, fake_compiler, capsys)
    assert not planted[1].exists()


@pytest.mark.parametrize("content", RECORDS)
def test_without_its_record_a_library_never_runs(content, fake_compiler, planted, capsys):
    library = build._build()
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(planted[0])
    record = library.with_suffix(".json")
    record.unlink()
    if RECORDS[content] is not None:
        record.write_bytes(RECORDS[content])
    made_again(library, whole, fake_compiler, capsys)
    assert not planted[1].exists()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "writable", "record is a link", "record is a folder"])
def test_what_is_no_private_file_is_replaced(kind, fake_compiler, tmp_path, capsys):
    library = build._build()
    whole = library.read_bytes()
    path = library.with_suffix(".json") if kind.startswith("record") else library
    shutil.copy(path, tmp_path / "elsewhere")
    if kind == "writable":
        path.chmod(0o666)
    else:
        path.unlink()
        if kind.endswith("link"):
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
            (path / "file").write_text("")
    made_again(library, whole, fake_compiler, capsys)
    assert stat_of(library) == (0o100600, 0o100600)


def stat_of(library):
    return tuple(os.lstat(path).st_mode for path in (library, library.with_suffix(".json")))


def test_leftovers_of_killed_builds_are_removed_but_not_those_of_running_ones(fake_compiler):
    kernels = build._build().parent.parent
    for name in ("killed", "running"):
        (kernels / name / "build-1").mkdir(parents=True, mode=0o700)
        (kernels / name / "build-1" / "0.o").write_text("")
    (kernels / "killed" / "build-2").write_text("")
    fake_compiler.says("another")
    with stored.locked(kernels / "running", print):
        build._build()
    assert sorted(str(path.relative_to(kernels)) for path in kernels.glob("*/build-*")) == ["running/build-1"]


@pytest.mark.parametrize("name", ["phi3_jax", "phi3_jax/kernels", "key"])
def test_a_folder_that_others_could_write_is_emptied(name, fake_compiler, planted, capsys):
    library = build._build()
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(planted[0])
    made = {"size": len(planted[0]), "sha256": hashlib.sha256(planted[0]).hexdigest()}
    library.with_suffix(".json").write_text(json.dumps(made))
    folder = library.parent if name == "key" else Path(os.environ["XDG_CACHE_HOME"], name)
    folder.chmod(0o777)
    capsys.readouterr()
    assert build._build().read_bytes() == whole
    assert "others could write to" in capsys.readouterr().err
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not planted[1].exists()


def test_a_linked_folder_is_refused(fake_compiler, tmp_path):
    kernels = build._build().parent.parent
    kernels.rename(tmp_path / "elsewhere")
    kernels.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="is a symbolic link; remove it"):
        build._build()


def test_a_failed_build_is_remembered_until_something_changes(fake_compiler, monkeypatch):
    source = compiler.SOURCES / "ffi" / "version_ffi.cpp"

    def fails():
        with pytest.raises(Unavailable, match=r"c\+\+ failed with exit code 1: .*error: what is this.*GCC 10") as told:
            build._build()
        calls, remembered = fake_compiler.calls(), str(told.value).split("or ")[-1].removesuffix(" deleted")
        with pytest.raises(Unavailable) as again:
            build._build()
        assert str(again.value) == str(told.value)
        assert fake_compiler.calls() == 0
        return calls, Path(remembered)

    fake_compiler.behaves("echo 'x.cpp:1:2: error: what is this' >&2; exit 1", only="version_ffi.cpp")
    calls, first = fails()
    assert calls == 3  # isa.so was made, the library was tried
    fake_compiler.says("fake 1.1")
    assert fails()[0] == 3
    source.write_text(source.read_text() + "// changed\n")
    assert fails()[0] == 3
    other = fake_compiler.path.with_name("other-c++")
    shutil.copy(fake_compiler.path, other)
    monkeypatch.setenv("CXX", str(other))
    assert fails()[0] == 3
    monkeypatch.setenv("CXX", f"{other} -g")
    calls, last = fails()
    assert calls == 3
    assert last.exists()
    assert first.exists()
    assert last != first
    last.unlink()
    assert fails()[0] == 1
    fake_compiler.behaves("")
    last.unlink()
    assert build._build().exists()


@pytest.mark.parametrize(
    "behaviour",
    [
        "kill -9 $$",
        "kill -7 $$",
        "exit 137",  # what a shell says of a killed command
        "echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1",
        "echo 'c++: error: unable to execute command: Killed' >&2; exit 254",
        "echo 'x.cpp:1: fatal error: error writing to /tmp/x.s: No space left on device' >&2; exit 1",
        "echo 'cc1plus: out of memory allocating 65536 bytes after a total of 1 bytes' >&2; exit 1",
        "echo 'LLVM ERROR: IO failure on output stream: Disk quota exceeded' >&2; exit 1",
        "echo \"collect2: fatal error: cannot find 'ld'\" >&2; exit 1",  # PATH lacks it
        "echo 'x.cpp:1:10: fatal error: algorithm: No such file or directory' >&2; exit 1",
        "echo \"x.cpp:1:10: fatal error: 'algorithm' file not found\" >&2; exit 1",
        "exec sleep 9",
    ],
)
def test_what_may_pass_is_not_remembered(behaviour, fake_compiler, monkeypatch):
    monkeypatch.setattr(compiler, "_SECONDS", 0.2 if "sleep" in behaviour else 900)
    fake_compiler.behaves(behaviour)
    with pytest.raises(Unavailable, match="the next start tries again"):
        build._build()
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.failed"))
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("build-*"))
    fake_compiler.behaves("")
    monkeypatch.setattr(compiler, "_SECONDS", 900)
    assert build._build().exists()


def test_what_is_no_compiler_is_named(fake_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(Unavailable, match="CXX=no-such-compiler -O1, but there is no program no-such-compiler"):
        build._build()
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(Unavailable, match=r"CXX='g.*name a C"):
        build._build()
    (tmp_path / "text").write_bytes(b"\x00\x01")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "text"))
    with pytest.raises(Unavailable, match=r"text could not be run: .*set CXX to another"):
        build._build()


def test_without_a_compiler_what_was_compiled_before_runs(fake_compiler, monkeypatch, tmp_path):
    library = build._build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build._build() == library
    library.with_suffix(".json").unlink()
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler; install one"):
        build._build()


def test_who_holds_the_lock_is_told_and_not_waited_for_without_end(tmp_path):
    told = []
    with stored.locked(tmp_path, told.append):
        assert told == []
        start = time.monotonic()
        another = stored.locked(tmp_path, told.append, seconds=0.3)
        with pytest.raises(TimeoutError, match=f"another process has held {tmp_path}/lock for 0 s"):
            another.__enter__()
        assert time.monotonic() - start < 3
    assert told == [f"waiting for process {os.getpid()}, which builds the CPU kernels and holds {tmp_path}/lock"]
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again


def test_a_library_that_cannot_be_loaded_is_named(fake_compiler, tmp_path):
    (fake_compiler.folder / "made" / "isa.so").write_text("the linker made nonsense\n")
    with pytest.raises(Unavailable, match=r"isa\.so: .*; remove .*or set XDG_CACHE_HOME elsewhere"):
        build._build()


def other_process(fake, **more):
    command = [sys.executable, "-c", BUILD, str(compiler.SOURCES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.slow
def test_a_build_that_was_killed_leaves_nothing_after_the_next(fake_compiler):
    fake_compiler.behaves("echo > ${0%/*}/started; exec sleep 9", only="version_ffi.cpp")
    process = other_process(fake_compiler)
    while not (fake_compiler.folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    cache = Path(os.environ["XDG_CACHE_HOME"])
    assert len(list(cache.rglob("build-*"))) == 1
    fake_compiler.behaves("")
    library = build._build()
    names = {"isa.so", "isa.json", "portable.so", "portable.json", "lock"}
    assert {path.name for path in library.parent.iterdir()} == names


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can mount a folder")
def test_a_folder_that_cannot_be_written_serves_what_is_whole(fake_compiler):
    library = build._build()
    cache = os.environ["XDG_CACHE_HOME"]
    mount = f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache} && exec "
    command = ["unshare", "-m", "sh", "-c", f'{mount} "$@"', "sh", sys.executable, "-c", BUILD, str(compiler.SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.stdout.strip(), done.stderr) == (str(library), "")
    library.with_suffix(".json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Unavailable: they could not be written to the cache ([Errno 30] Read-only file system" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can mount a small disk")
def test_a_full_disk_is_not_remembered(fake_compiler):
    cache = os.environ["XDG_CACHE_HOME"]
    Path(cache).mkdir(mode=0o700)
    mount = f"mount -t tmpfs -o size=40k,mode=0700 tmpfs {cache} && "
    twice = f'"$@"; find {cache} -name "*.failed"; mount -o remount,size=1m {cache}; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", f"{mount} {twice}", "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", BUILD, str(compiler.SOURCES)], capture_output=True, text=True
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert "No space left on device; the next start tries again" in done.stderr
    assert done.stdout.endswith("/portable.so\n")
    assert ".failed" not in done.stdout


def test_a_library_and_its_record_are_on_the_disk_when_they_are_kept(tmp_path, monkeypatch):
    made, library, synced = tmp_path / "made", tmp_path / "portable.so", []
    made.write_bytes(b"code")
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    stored.keep(made, library)
    assert stored.problem(library) is None
    order = [library, tmp_path, library.with_suffix(".json"), tmp_path]
    assert synced == [path.stat().st_ino for path in order]

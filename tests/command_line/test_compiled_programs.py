"""Compiled programs that are kept: in a private folder, and made again where they are damaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.command_line import compiled_programs

SCRIPT = """'''A program.'''
import jax
from phi3_jax.command_line.program import run_program

def main():
    print(jax.jit(lambda x: x @ x)(jax.numpy.arange(9.0).reshape(3, 3)).sum())
    return 0

run_program("probe", main, {})
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The settings that `keep` gives to jax, and what it says; a home of the test's own."""
    settings, told = {}, []
    monkeypatch.setattr(compiled_programs.jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda folder: compiled_programs.keep(folder, told.append) or (settings, told)


def test_the_default_folder_is_private(kept, tmp_path):
    settings, told = kept(compiled_programs.default_folder())
    folder = tmp_path / "phi3_jax" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert told == []
    (folder / "jit_planted-cache").write_text("")
    folder.chmod(0o777)
    settings, told = kept(str(folder))
    assert list(folder.iterdir()) == []
    assert [f"others could write to {folder}" in line for line in told] == [True]


def test_a_folder_that_is_not_private_is_not_used(kept, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "phi3_jax").symlink_to(tmp_path / "elsewhere")
    settings, told = kept(compiled_programs.default_folder())
    assert settings == {}
    assert "compiled programs are not kept, so each start compiles them: " in told[0]
    assert f"{tmp_path}/phi3_jax is a symbolic link; remove it" in told[0]


def test_a_named_folder_is_made_private_and_never_emptied(kept, tmp_path):
    folder = tmp_path / "a" / "b"
    settings, told = kept(str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings.pop("jax_compilation_cache_dir") == str(folder)
    settings.clear()
    (folder / "file").write_text("")
    folder.chmod(0o777)
    settings, told = kept(str(folder))
    assert settings == {}
    assert f"others may write to {folder}, whose contents are run; do: chmod go-w {folder}" in told[0]
    assert (folder / "file").exists()
    settings, told = kept(str(folder / "file" / "below"))
    assert settings == {}
    assert "Not a directory" in told[1]


def test_what_is_no_program_is_removed(kept, tmp_path):
    """jax would read all of it: a pipe for ever, a device until the memory is full."""
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o700)
    (folder / "jit_a-cache").symlink_to("/dev/zero")
    os.mkfifo(folder / "jit_b-cache")
    (folder / "jit_c-cache").mkdir()
    os.truncate(os.open(folder / "jit_d-cache", os.O_CREAT | os.O_WRONLY), 10**11)
    (folder / "jit_e-cache").symlink_to("nowhere")
    (folder / "jit_f-cache").write_text("a program")
    settings, told = kept(str(folder))
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["jit_e-cache", "jit_f-cache"]
    assert sorted(told) == [f"{folder}/jit_{name}-cache is not a compiled program, and was removed" for name in "abcd"]


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("HOME", "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compiled_programs.default_folder() == ""


def test_other_warnings_stay_as_they_are():
    assert compiled_programs.repair("Some weights were not used") == "Some weights were not used"


@pytest.mark.slow
def test_damaged_entries_are_made_again_at_one_start(tmp_path):
    (tmp_path / "probe.py").write_text(SCRIPT)

    def start():
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(tmp_path / "probe.py")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (0, "486.0\n")
        return done.stderr

    folder = tmp_path / "phi3_jax" / "compiled"
    assert start() == ""
    entries = {path: path.read_bytes() for path in sorted(folder.glob("*-cache"))}
    assert len(entries) >= 3
    for number, (path, whole) in enumerate(entries.items()):
        half = len(whole) // 2
        path.write_bytes([b"", whole[:half], whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :]][number % 3])
    said = f"damaged entries among the compiled programs in {folder} were removed, and are compiled again"
    assert start() == f"probe: warning: {said}\n"
    assert start() == ""
    assert {path.name for path in Path(folder).glob("*-cache")} == {path.name for path in entries}

"""A C++ compiler of tests' own: it takes no time, writes down how it was called, and fails as it is told."""

import shutil
import stat
from pathlib import Path

import pytest

from phi3_jax.kernels.native import compiler

_SCRIPT = """#!/bin/sh
echo "$*" >> {folder}/calls
case "$*" in *--version) cat {folder}/version; exit 0 ;; esac
. {folder}/behaviour
for output; do :; done  # -o and its name come last
case "$*" in
  *-shared*) cp {folder}/made/"${{output##*/}}" "$output" ;;
  *) echo > "$output" ;;
esac
"""


class FakeCompiler:
    """Says what it says of itself in `version`; `behaviour` is run by a shell before each file; `made` is linked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "c++"
        (folder / "made").mkdir(parents=True)
        self.behaves("")
        self.says("fake 1.0")
        self.path.write_text(_SCRIPT.format(folder=folder))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    def behaves(self, script: str, only: str = "") -> None:
        """Runs a shell's script at each call whose arguments have `only` among them."""
        (self.folder / "behaviour").write_text(f'case "$*" in *"{only}"*) :; {script}\n;; esac\n')

    def says(self, version: str) -> None:
        (self.folder / "version").write_text(f"{version}\n")

    def calls(self) -> int:
        """How often it was to compile or link something since the last time this was asked."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return sum(not line.endswith("--version") for line in lines)


@pytest.fixture(scope="module")
def small_libraries(tmp_path_factory):
    """A real isa.so, and a library of one small file: compiled once."""
    if (command := compiler.find()) is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("small")
    for name, source in (("isa.so", "isa.cpp"), ("portable.so", "ffi/version_ffi.cpp")):
        compiler.compile_library(command, [compiler.SOURCES / source], (), folder / name)
    return folder


@pytest.fixture
def fake_compiler(small_libraries, tmp_path, monkeypatch):
    """CXX is a fake compiler; sources and cache are small and of the test's own."""
    sources = tmp_path / "sources"
    for name in ("isa.cpp", "ffi/version_ffi.cpp"):
        (sources / name).parent.mkdir(exist_ok=True)
        shutil.copy(compiler.SOURCES / name, sources / name)
    fake = FakeCompiler(tmp_path / "compiler")
    for path in small_libraries.glob("*.so"):
        shutil.copy(path, fake.folder / "made")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake.path))
    monkeypatch.setenv("PHI3_JAX_ISA", "portable")
    monkeypatch.delenv("PHI3_JAX_NATIVE", raising=False)
    return fake

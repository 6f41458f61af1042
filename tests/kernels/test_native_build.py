"""Compiling the CPU kernels: once for all processes, never half-written, and with one clear line where it fails."""

import os
import platform
import subprocess
import sys

import pytest

from phi3_jax import user_cache
from phi3_jax.kernels import Unavailable
from phi3_jax.kernels.native import build, compiler

SOURCES = compiler.SOURCES
needs_kernels = pytest.mark.skipif(build.why_unavailable() is not None, reason=f"no kernels: {build.why_unavailable()}")
SCRIPT = "from phi3_jax.kernels import status; print(status()['attention'])"


@pytest.fixture
def one_source(tmp_path, monkeypatch):
    """A library of one small file, so that compiling takes no time, and a cache folder of its own."""
    sources = tmp_path / "sources"
    for name in ("isa.cpp", "ffi/version_ffi.cpp"):
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).write_text((SOURCES / name).read_text())
    monkeypatch.setattr(compiler, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PHI3_JAX_NATIVE", raising=False)
    return sources / "ffi" / "version_ffi.cpp"


@needs_kernels
def test_a_library_is_made_once_and_again_when_a_source_changes(one_source, capsys):
    first = build._build()
    assert "compiling the CPU kernels" in capsys.readouterr().err
    made = first.stat().st_mtime_ns
    assert build._build() == first
    assert first.stat().st_mtime_ns == made
    assert capsys.readouterr().err == ""
    one_source.write_text(one_source.read_text() + "\n// changed\n")
    assert build._build() != first
    names = {"isa.json", "isa.so", "lock", first.with_suffix(".json").name, first.name}
    assert {path.name for path in first.parent.iterdir()} == names


def test_a_library_is_named_after_every_file_that_may_be_included_and_jaxlib(one_source, monkeypatch):
    keys = [compiler.source_key()]
    for name in ("one.inc", "ffi/table.inc", "header.h", "ffi/more.hpp"):
        (one_source.parents[1] / name).write_text("// new\n")
        keys.append(compiler.source_key())
        (one_source.parents[1] / name).write_text("// other\n")
        keys.append(compiler.source_key())
    (one_source.parents[1] / "table.inc").write_text("// other\n")  # the same content at another place
    (one_source.parents[1] / "ffi" / "table.inc").unlink()
    keys.append(compiler.source_key())
    monkeypatch.setattr(compiler.jaxlib.version, "__version__", "99.0")  # its headers are in all libraries
    keys.append(compiler.source_key())
    assert len(set(keys)) == len(keys)
    (one_source.parent / "build.py").write_text("Python is compiled by others\n")
    assert compiler.source_key() == keys[-1]


@needs_kernels
def test_two_processes_at_once_make_one_library(one_source, tmp_path):
    script = (
        "import sys, pathlib; from phi3_jax.kernels.native import build, compiler;"
        "compiler.SOURCES = pathlib.Path(sys.argv[1]); print(build._build())"
    )
    command = [sys.executable, "-c", script, str(compiler.SOURCES)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert answers[0][0] == answers[1][0] != ""
    assert sum("compiling" in err for _, err in answers) == 1


def test_a_compiler_that_fails_leaves_nothing_and_says_what_it_said(one_source):
    one_source.write_text("this is not C++\n")
    with pytest.raises(Unavailable, match=r"failed with exit code 1: .*error"):
        build._build()
    assert [path.name for path in user_cache.cache_folder("kernels").rglob("*.so")] == ["isa.so"]
    assert not list(user_cache.cache_folder("kernels").rglob("*.o"))


def test_a_cache_folder_that_cannot_be_written_is_named(one_source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"could not be written to .*set XDG_CACHE_HOME"):
        build._build()


@needs_kernels
def test_a_library_for_another_version_of_the_interface_is_not_registered(one_source):
    one_source.write_text(one_source.read_text().replace("return XLA_FFI_API_MINOR", "return XLA_FFI_API_MINOR + 1"))
    import ctypes

    with pytest.raises(Unavailable, match="compiled for version"):
        build.check_version(ctypes.CDLL(str(build._build())))


def run(tmp_path, **variables):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    out, err = run(tmp_path, PATH=str(tmp_path), CXX="")
    reason = "there is no C++ compiler; install one, for instance with: apt install g++"
    assert out == f"xla, because the CPU kernels cannot be used: {reason}"
    assert err.splitlines() == [err]
    assert err.startswith("phi3_jax: the compiled CPU kernels cannot be used, and XLA alone is slower: there is no C++")


def test_they_can_be_switched_off(tmp_path):
    assert "switched off by PHI3_JAX_NATIVE=0" in run(tmp_path, PHI3_JAX_NATIVE="0")[0]


@needs_kernels
def test_the_environment_chooses_the_instruction_set(one_source, monkeypatch):
    monkeypatch.setenv("PHI3_JAX_ISA", "portable")
    assert build._build().name == "portable.so"
    monkeypatch.setenv("PHI3_JAX_ISA", "neon" if platform.machine() == "x86_64" else "avx2")
    with pytest.raises(Unavailable, match=r"PHI3_JAX_ISA=\w+, but this processor has .*portable"):
        build._build()


@pytest.mark.slow
@needs_kernels
def test_the_chosen_instruction_set_is_what_runs():
    assert run_here({"PHI3_JAX_ISA": "portable"}) == "cpu kernels (portable)"


def run_here(variables):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)
    return done.stdout.strip()

"""Compiles the C++ kernels when they are first needed, into the user's cache folder, and loads them.

The folder's name says what the library was made from: the sources, the compiler, the flags and jaxlib's headers. When
one of them changes, another library is made. A library is for one instruction set; isa.cpp says which is best here.
All its files are compiled with the flags of that set; linear/vectors.h and attention/vectors.h pick the vector code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib.version

_SOURCES = Path(__file__).parent
# The vectoriser is off, because GCC 12's read past the end of a buffer; the kernels are written in vectors anyway.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-tree-vectorize"),
)
# The flags of each instruction set that there is vector code for.
_INSTRUCTION_SETS = {
    "avx512_bf16": ("-march=skylake-avx512", "-mavx512vnni", "-mavx512bf16"),
    "avx512": ("-march=skylake-avx512", "-mavx512vnni"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),
    "portable": ("-DPHI3_PORTABLE",),  # no vector code, although the compiler may know some for this processor
}
# Functions of XLA's foreign function interface, each under the name by which a program calls it.
_HANDLERS = ("phi3_linear_bf16", "phi3_linear_quantized", "phi3_attention", "phi3_cache_write")


class Unavailable(Exception):  # noqa: N818 - a reason rather than a fault
    """The kernels cannot be used here; the text says why, and what to do about it."""


def library() -> ctypes.CDLL:
    """The loaded library, its handlers known to XLA. Raises Unavailable if the kernels cannot be used here."""
    loaded = _load_once()
    if isinstance(loaded, str):
        raise Unavailable(loaded)
    return loaded


def why_unavailable() -> str | None:
    """Why `library` raises; None if it does not."""
    loaded = _load_once()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    """The library, or the reason why there is none, which is also printed to standard error."""
    try:
        loaded = ctypes.CDLL(str(_build()))
        _check_version(loaded)
    except (Unavailable, OSError) as error:
        _note(f"the compiled CPU kernels cannot be used, and XLA alone is slower: {error}")
        return str(error)
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax" / "kernels"


def _build() -> Path:
    if os.environ.get("PHI3_JAX_NATIVE") == "0":
        raise Unavailable("switched off by PHI3_JAX_NATIVE=0")
    if os.name != "posix":
        raise Unavailable(f"they are compiled on Linux and macOS only, not on {platform.system()}")
    compiler = _compiler()
    folder = cache_folder() / _key(compiler)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        isa = _choose(_made(folder / "isa.so", lambda path: _compile(compiler, [_SOURCES / "isa.cpp"], (), path)))
        return _made(folder / f"{isa}.so", lambda path: _compile_kernels(compiler, isa, path))
    except OSError as error:
        raise Unavailable(f"they could not be written to {folder} ({error}); set XDG_CACHE_HOME elsewhere") from None


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """The file, which is made if it is not there; by one process, if several come at the same time."""
    if not target.exists():
        with _locked(target.parent / "lock"):
            if not target.exists():  # another process may have been first
                make(target)
    return target


def _choose(probe: Path) -> str:
    """The instruction set that PHI3_JAX_ISA names, or the best one of this processor; `probe` is isa.cpp, compiled."""
    loaded = ctypes.CDLL(str(probe))
    loaded.phi3_best_isa.restype = ctypes.c_char_p
    wanted = os.environ.get("PHI3_JAX_ISA")
    if not wanted:
        return loaded.phi3_best_isa().decode()
    here = [name for name in _INSTRUCTION_SETS if loaded.phi3_supports_isa(name.encode())]
    if wanted not in here:
        raise Unavailable(f"PHI3_JAX_ISA={wanted}, but this processor has {', '.join(here)}")
    return wanted


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("there is no C++ compiler; install one, for instance with: apt install g++")


def _sources() -> list[Path]:
    """The files of a library, which are the same for every instruction set."""
    return sorted(path for path in _SOURCES.rglob("*.cpp") if path.name != "isa.cpp")


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    settings = (repr(_FLAGS), repr(_INSTRUCTION_SETS))
    for text in (jaxlib.version.__version__, platform.machine(), compiler, version, *settings):
        digest.update(text.encode() + b"\0")
    for path in sorted(path for end in ("cpp", "h") for path in _SOURCES.rglob(f"*.{end}")):
        digest.update(str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compile_kernels(compiler: str, isa: str, target: Path) -> None:
    _note(f"compiling the CPU kernels for this machine ({isa}), once (about ten seconds)")
    _compile(compiler, _sources(), _INSTRUCTION_SETS[isa], target)


def _compile(compiler: str, sources: list[Path], flags: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        always = (*_FLAGS, *flags, f"-I{_SOURCES}", "-isystem", jax.ffi.include_dir())
        objects = {str(Path(scratch, f"{number}.o")): str(path) for number, path in enumerate(sources)}
        commands = [[compiler, *always, "-c", path, "-o", made] for made, path in objects.items()]
        running: set[subprocess.Popen[str]] = set()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                list(pool.map(functools.partial(_run, running=running), commands))
            except BaseException:  # Ctrl-C, for one; nobody waits for the others any more
                for process in [*running]:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                raise
        library = Path(scratch, target.name)
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
        library.rename(target)


def _run(command: list[str], running: set[subprocess.Popen[str]] | None = None) -> None:
    """Runs a compiler, which is in `running` while it does. Raises Unavailable if it fails."""
    running = set() if running is None else running
    # A process group of its own: what Ctrl-C does to us, it does to them only through us, and is no failure of theirs.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        running.add(process)
        try:
            _, said = process.communicate()
        finally:
            running.discard(process)
    if process.returncode:
        lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or [""]
        raise Unavailable(f"{command[0]} failed with exit code {process.returncode}: {lines[0].strip()}")


def _check_version(loaded: ctypes.CDLL) -> None:
    """XLA refuses a handler of another version, and then its whole CPU backend does not start: so look first."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    wanted = tuple(
        int(match[1]) if (match := re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)) else -1
        for part in ("MAJOR", "MINOR")
    )
    made = (loaded.phi3_ffi_api_major(), loaded.phi3_ffi_api_minor())
    if made != wanted:
        raise Unavailable(f"they were compiled for version {made} of XLA's interface, but jaxlib has {wanted}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file; waits while another process holds it."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _note(text: str) -> None:
    # A library should not print; but ten silent seconds, or a run that is many times slower, would be worse.
    print(f"phi3_jax: {text}", file=sys.stderr, flush=True)

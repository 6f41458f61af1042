"""Compiles the C++ kernels when they are first needed, into the user's cache folder, and loads them.

The folder's name says what the library was made from: the sources, the compiler, the flags and jaxlib's headers. When
one of them changes, another library is made. A library is for one instruction set; isa.cpp says which is best here.
All its files are compiled with the flags of that set; linear/vectors.h and attention/vectors.h pick the vector code.
compiler.py runs the compiler; stored.py checks that a library is what was compiled, before any of it runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from phi3_jax import user_cache
from phi3_jax.kernels.native import compiler, stored
from phi3_jax.kernels.native.compiler import Refused, Unavailable

# Functions of XLA's foreign function interface, each under the name by which a program calls it.
_HANDLERS = ("phi3_linear_bf16", "phi3_linear_quantized", "phi3_attention", "phi3_cache_write", "phi3_reserve")
_HANDLERS += ("phi3_rms_norm", "phi3_add_updates")
SWITCHED_OFF = "switched off by PHI3_JAX_NATIVE=0"


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
        loaded = open_library(_build())
        check_version(loaded)
        handlers = {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in _HANDLERS}
    except (Unavailable, AttributeError) as error:  # a name that is not there is an AttributeError
        note(f"the compiled CPU kernels cannot be used, and XLA alone is slower: {error}")
        return str(error)
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return loaded


def _build() -> Path:
    """The checked library for this machine, which is made if it is not there."""
    if os.environ.get("PHI3_JAX_NATIVE") == "0":
        raise Unavailable(SWITCHED_OFF)
    if os.name != "posix":
        raise Unavailable(f"they are compiled on Linux and macOS only, not on {platform.system()}")
    command, sources = compiler.find(), compiler.source_key()
    try:
        kernels = user_cache.private_cache_folder("kernels", told=note)
        if command is None:
            return _made_before(kernels, sources)
        name = f"{sources}-{compiler.compiler_key(command)}"
        folder = user_cache.private_cache_folder("kernels", name, told=note)
        probe = [compiler.SOURCES / "isa.cpp"]
        isa = _choose(made(folder / "isa.so", lambda path: compiler.compile_library(command, probe, (), path), None))
        files, flags = compiler.sources(), compiler.INSTRUCTION_SETS[isa]
        what = f"the CPU kernels for this machine ({isa}), once (about ten seconds)"
        return made(folder / f"{isa}.so", lambda path: compiler.compile_library(command, files, flags, path), what)
    except user_cache.UntrustedError as error:
        raise Unavailable(str(error)) from None
    except OSError as error:
        raise Unavailable(f"they could not be written to the cache ({error}); set XDG_CACHE_HOME elsewhere") from None


def _made_before(kernels: Path, sources: str) -> Path:
    """A library that some compiler has made from these sources: there is none here any more, as in many a container."""
    for folder in sorted(kernels.glob(f"{sources}-*")):
        user_cache.private_cache_folder("kernels", folder.name, told=note)
        if stored.problem(folder / "isa.so") is None:
            library = folder / f"{_choose(folder / 'isa.so')}.so"
            if stored.problem(library) is None:
                return library
    raise Unavailable("there is no C++ compiler; install one, for instance with: apt install g++")


def made(target: Path, make: Callable[[Path], None], what: str | None) -> Path:
    """The file `target`, which is made if it is not there or damaged; by one process, if several come at the same time.

    Args:
      make: compiles it, at the path that it is given; it raises Refused if trying again would not help.
      what: what is compiled, for those who wait; None if it takes no time.
    """
    if _is_whole(target):
        return target
    with stored.locked(target.parent, note):
        if _is_whole(target):  # another process was first
            return target
        user_cache.close_to_others(target.parent)
        if (problem := stored.problem(target)) != stored.MISSING:
            note(f"{target} {problem}: compiling it again")
        elif what is not None:
            note(f"compiling {what}")
        with stored.scratch(target.parent) as scratch:
            try:
                make(scratch / target.name)
            except Refused as error:
                stored.remember_failure(target, str(error))
                raise Unavailable(stored.failure(target) or str(error)) from None
            stored.keep(scratch / target.name, target)
    return target


def _is_whole(library: Path) -> bool:
    """Whether the library can be loaded. Raises Unavailable if it cannot, and the compiler has failed to make it."""
    if stored.problem(library) is None:
        return True
    if (failure := stored.failure(library)) is not None:
        raise Unavailable(failure)
    return False


def open_library(library: Path) -> ctypes.CDLL:
    """Loads a library. Raises Unavailable, with a remedy, if that fails."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # for instance in a folder of which nothing may be executed
        raise Unavailable(f"{error}; remove {library.parent}, or set XDG_CACHE_HOME elsewhere") from None


def _choose(probe: Path) -> str:
    """The instruction set that PHI3_JAX_ISA names, or the best one of this processor; `probe` is isa.cpp, compiled."""
    loaded = open_library(probe)
    loaded.phi3_best_isa.restype = ctypes.c_char_p
    wanted = os.environ.get("PHI3_JAX_ISA")
    if not wanted:
        return loaded.phi3_best_isa().decode()
    here = [name for name in compiler.INSTRUCTION_SETS if loaded.phi3_supports_isa(name.encode())]
    if wanted not in here:
        raise Unavailable(f"PHI3_JAX_ISA={wanted}, but this processor has {', '.join(here)}")
    return wanted


def check_version(loaded: ctypes.CDLL) -> None:
    """Raises Unavailable if a library was compiled for another version of XLA's interface.

    XLA refuses a handler of another version, and then its whole CPU backend does not start: so look first.
    """
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    wanted = tuple(
        int(match[1]) if (match := re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)) else -1
        for part in ("MAJOR", "MINOR")
    )
    made = (loaded.phi3_ffi_api_major(), loaded.phi3_ffi_api_minor())
    if made != wanted:
        raise Unavailable(f"they were compiled for version {made} of XLA's interface, but jaxlib has {wanted}")


def note(text: str) -> None:
    """Tells the user about something that takes time, or that is not as it should be."""
    # A library should not print; but ten silent seconds, or a run that is many times slower, would be worse.
    print(f"phi3_jax: {text}", file=sys.stderr, flush=True)

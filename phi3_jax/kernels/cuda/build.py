"""Compiles the kernels for NVIDIA cards when they are first needed, into the user's cache folder, and loads them.

The kernels, in .cu files, are compiled by NVRTC for the cards that this process computes on; what starts them and what
XLA calls, in .cpp files, by the C++ compiler of the CPU kernels. Where there is no card, programs can be compiled ahead
of time for one: that takes the second part alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from phi3_jax import user_cache
from phi3_jax.kernels.cuda import nvrtc
from phi3_jax.kernels.native import build as native
from phi3_jax.kernels.native import compiler
from phi3_jax.kernels.native.compiler import Unavailable

SOURCES = Path(__file__).parent
# Functions of XLA's foreign function interface, each under the name by which a program calls it.
HANDLERS = ("phi3_cuda_linear", "phi3_cuda_attention", "phi3_cuda_cache_write")
_OLDEST = 80  # compute capability 8.0, Ampere: bfloat16 on tensor cores, and copies that nobody waits for


def library() -> ctypes.CDLL:
    """The loaded library, its handlers known to XLA. Raises Unavailable if the kernels cannot be used here."""
    loaded = _load_once()
    if isinstance(loaded, str):
        raise Unavailable(loaded)
    return loaded


def why_unavailable() -> str | None:
    """Why `library` raises; None if it does not. To be asked where `jax.default_backend()` is "gpu"."""
    loaded = _load_once()
    return loaded if isinstance(loaded, str) else None


def launcher(command: list[str], files: list[Path], flags: tuple[str, ...], target: Path) -> None:
    """Compiles these files and all that starts kernels into a library. Raises what `compile_library` raises."""
    files = [*sorted(SOURCES.glob("*.cpp")), compiler.SOURCES / "ffi" / "version_ffi.cpp", *files]
    compiler.compile_library(command, files, (f"-I{SOURCES}", *flags), target)


def register(loaded: ctypes.CDLL, platform: str) -> None:
    """Makes the library's handlers known to XLA. Raises Unavailable or AttributeError if it is another one."""
    native.check_version(loaded)
    handlers = {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in HANDLERS}
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def cubins(capability: int) -> list[Path]:
    """The checked files of kernels for cards of a compute capability, which are made if they are not there.

    Raises Unavailable if they cannot be.
    """
    architecture, headers = nvrtc.architecture(capability), sorted(SOURCES.glob("*.h"))
    key = cubin_key(architecture)

    def one(source: Path) -> Path:
        # A folder of their own each, since one process builds in a folder at a time.
        folder = user_cache.private_cache_folder("kernels", f"{key}-{source.stem}", told=native.note)
        what = f"the kernels of {source.name} for cards of compute capability {capability / 10}, once"
        return native.made(
            folder / f"sm_{architecture}.cubin",
            lambda path: path.write_bytes(nvrtc.compile_cubin(source, headers, architecture)[0]) and None,
            what,
        )

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, sorted(SOURCES.glob("*.cu"))))


def cubin_key(architecture: int) -> str:
    """What kernels are made from, in letters: all sources, NVRTC and its flags, the architecture."""
    texts = (repr(nvrtc.version()), repr(nvrtc.FLAGS), str(architecture))
    return compiler.digest([*(text.encode() for text in texts), *compiler.contents(SOURCES)])


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    """The library, or the reason why there is none, which is also printed to standard error."""
    try:
        if os.environ.get("PHI3_JAX_NATIVE") == "0":
            raise Unavailable(native.SWITCHED_OFF)
        cards = _capabilities()
        loaded = native.open_library(_launcher())
        register(loaded, "CUDA")
        for capability in cards:
            for path in cubins(capability):
                content = path.read_bytes()
                loaded.phi3_cuda_add(capability, content, ctypes.c_size_t(len(content)))
    except user_cache.UntrustedError as error:
        reason = str(error)
    except OSError as error:
        reason = f"they could not be written to the cache ({error}); set XDG_CACHE_HOME elsewhere"
    except (Unavailable, AttributeError) as error:  # a name that is not there is an AttributeError
        reason = str(error)
    else:
        return loaded
    native.note(f"the compiled kernels for NVIDIA cards cannot be used, and XLA alone is slower: {reason}")
    return reason


def _capabilities() -> list[int]:
    """The compute capabilities of this process' cards, 90 for 9.0. Raises Unavailable if one cannot run the kernels."""
    found = set()
    for device in jax.local_devices():
        if device.platform != "gpu":  # it compiles for cards that are not here
            continue
        said = getattr(device, "compute_capability", None)
        if not (match := re.fullmatch(r"(\d+)\.(\d)", str(said))):
            raise Unavailable(f"{device.device_kind} is no NVIDIA card")
        capability = 10 * int(match[1]) + int(match[2])
        if capability < _OLDEST:
            raise Unavailable(
                f"{device.device_kind} has compute capability {said}; they need {_OLDEST / 10} or newer, as Ampere has"
            )
        found.add(capability)
    return sorted(found)


def _launcher() -> Path:
    """The checked library of what starts kernels, which is made if it is not there."""
    if (command := compiler.find()) is None:
        raise Unavailable("there is no C++ compiler; install one, for instance with: apt install g++")
    key = f"{compiler.source_key(SOURCES)}-{compiler.compiler_key(command)}"
    folder = user_cache.private_cache_folder("kernels", key, told=native.note)
    what = "what starts the kernels for NVIDIA cards, once (a few seconds)"
    return native.made(folder / "launcher.so", lambda path: launcher(command, [], (), path), what)

"""NVIDIA's compiler as a library: CUDA C++ to machine code of a card, without any header and without a card."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from phi3_jax.kernels.native.compiler import Refused, Unavailable

FLAGS = ("--std=c++17", "--device-as-default-execution-space", "--restrict", "--ptxas-options=-v")
_MISSING = "NVRTC is not installed, which jax's CUDA wheels bring along: pip install 'jax[cuda13]'"
_NOT_TAKEN = (5, 6)  # codes: options, or a file, that NVRTC does not know; others may pass, as where memory is short


def compile_cubin(source: Path, headers: Sequence[Path], architecture: int) -> tuple[bytes, str]:
    """A file's kernels as a cubin for cards of a compute capability, 90 for 9.0; and what the assembler says of them.

    Args:
      headers: what the file may include, by name.

    Raises:
      Refused: NVRTC does not take the file. Unavailable: it is not there, or failed otherwise.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    contents, names = (
        (ctypes.c_char_p * len(headers))(*each)
        for each in ([path.read_bytes() for path in headers], [path.name.encode() for path in headers])
    )
    text, name = source.read_bytes(), source.name.encode()
    if code := nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, len(headers), contents, names):
        raise Unavailable(f"NVRTC failed ({_explain(code)}); the next start tries again")
    try:
        options = [*FLAGS, f"--gpu-architecture=sm_{architecture}"]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if code:
            line = next((line for line in log.splitlines() if "error" in line), _explain(code))
            if code not in _NOT_TAKEN:
                raise Unavailable(f"NVRTC failed ({line}); the next start tries again")
            raise Refused(f"NVRTC {'.'.join(map(str, version()))} does not compile {source.name}: {line}")
        return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> tuple[int, int]:
    """NVRTC's version, such as (13, 0). Raises Unavailable if it is not there."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def architecture(capability: int) -> int:
    """The newest architecture that NVRTC knows and that cards of this compute capability run.

    Raises Unavailable if there is none, or NVRTC is not there.
    """
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(known)
    # Machine code is for one major version, and runs where the minor one is the same or newer.
    fitting = [each for each in known if each // 10 == capability // 10 and each <= capability]
    if not fitting:
        raise Unavailable(
            f"NVRTC {'.'.join(map(str, version()))} knows no card of compute capability "
            f"{capability // 10}.{capability % 10}; install a newer one: pip install -U nvidia-cuda-nvrtc"
        )
    return max(fitting)


@functools.cache
def _library() -> ctypes.CDLL:
    """The library of NVIDIA's wheel for CUDA 13 or 12, else the one that the system's loader finds."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    releases = [("cu13", "13"), ("cuda_nvrtc", "12")]
    if importlib.util.find_spec("jax_cuda12_plugin"):  # the driver may be as old, and load nothing that 13 has made
        releases.reverse()
    folders = [place / folder / "lib" for folder, _ in releases for place in places]
    files = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.*"))]
    for name in (*files, *(f"libnvrtc.so.{number}" for _, number in releases), "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        library.nvrtcDestroyProgram.argtypes = [ctypes.c_void_p]
        return library
    raise Unavailable(_MISSING)


def _bytes(size_of: ctypes._CFuncPtr, read: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:  # type: ignore[name-defined]
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def _explain(code: int) -> str:
    return _library().nvrtcGetErrorString(code).decode()

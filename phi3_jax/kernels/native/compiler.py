"""The C++ compiler, its flags, and what its failures mean."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib.version

SOURCES = Path(__file__).parent
# The vectoriser is off, because GCC 12's read past the end of a buffer; the kernels are written in vectors anyway.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-tree-vectorize"),
)
# The flags of each instruction set that there is vector code for.
INSTRUCTION_SETS = {
    "avx512_bf16": ("-march=skylake-avx512", "-mavx512vnni", "-mavx512bf16"),
    "avx512": ("-march=skylake-avx512", "-mavx512vnni"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),
    "portable": ("-DPHI3_PORTABLE",),  # no vector code, although the compiler may know some for this processor
}
KNOWN = "GCC 10 to 14 and clang 14 to 18 are known to compile the kernels"
_SECONDS = 900  # a file takes ten, on a slow and busy machine some more
# What compilers and linkers say when they were killed, or lacked something that may be there next time: room, another
# program of theirs (PATH is another in cron's jobs), a header or library that is installed later.
_PASSING = re.compile(
    r"no space left|quota exceeded|file too large|file size limit|read-only file system|input/output error"
    r"|out of memory|cannot allocate memory|memory exhausted|bad_alloc|too many open files|resource temporarily"
    r"|text file busy|signal terminated|due to signal|\bkilled\b|stale file handle"
    r"|no such file|cannot find|(file|library|command)( '\S+')? not found|cannot execute|unable to execute",
    re.IGNORECASE,
)


class Unavailable(Exception):  # noqa: N818 - a reason rather than a fault
    """The kernels cannot be used here; the text says why, and what to do about it."""


class Refused(Unavailable):
    """The compiler does not take these sources or flags, and it would not take them the next time."""


def find() -> list[str] | None:
    """The command of the compiler that CXX names, with the arguments that stand there, or a usual one; None without."""
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        try:
            name, *arguments = shlex.split(wanted)
        except ValueError as error:
            raise Unavailable(f"CXX={wanted}: {error}; name a C++ compiler, as in CXX=g++") from None
        if not (found := shutil.which(name)):
            raise Unavailable(f"CXX={wanted}, but there is no program {name}; unset CXX, or name a C++ compiler")
        return [found, *arguments]
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return [found] if found else None


def source_key(*folders: Path) -> str:
    """What a library is made from, in letters: all sources, the flags, jaxlib's headers, the kind of processor.

    Args:
      folders: where the sources are, besides those of the CPU kernels.
    """
    texts = (jaxlib.version.__version__, platform.machine(), repr(FLAGS), repr(INSTRUCTION_SETS))
    return digest([*(text.encode() for text in texts), *contents(SOURCES, *folders)])


def contents(*folders: Path) -> list[bytes]:
    """Names and contents of all that a compiler may read in these folders: whatever is not Python's."""
    files = sorted((folder, path) for folder in folders for path in folder.rglob("*") if path.is_file())
    ours = [(folder, path) for folder, path in files if path.suffix not in (".py", ".pyc")]
    return [part for folder, path in ours for part in (str(path.relative_to(folder)).encode(), path.read_bytes())]


def compiler_key(compiler: Sequence[str]) -> str:
    """Which compiler makes it: its command and what it says of itself."""
    command = [*compiler, "--version"]
    try:
        version = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, env=_english(), check=False
        ).stdout
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{shlex.join(command)} does not answer; set CXX to another compiler") from None
    except OSError as error:
        raise _not_run(command, error) from None
    return digest([*(word.encode() for word in compiler), version])


def sources() -> list[Path]:
    """The files of a library, which are the same for every instruction set."""
    return sorted(path for path in SOURCES.rglob("*.cpp") if path.name != "isa.cpp")


def compile_library(compiler: Sequence[str], files: Iterable[Path], flags: Sequence[str], target: Path) -> None:
    """Compiles the files into the library `target`, in whose folder others are left behind.

    Raises Refused if the compiler does not take them, Unavailable if it failed otherwise.
    """
    always = (*FLAGS, *flags, f"-I{SOURCES}", "-isystem", jax.ffi.include_dir())
    objects = {str(target.with_name(f"{number}.o")): str(path) for number, path in enumerate(files)}
    commands = [[*compiler, *always, "-c", path, "-o", made] for made, path in objects.items()]
    running: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(lambda command: _compile(command, target.parent, running), commands))
        except BaseException:  # Ctrl-C, or one of them has failed: nobody waits for the others any more
            for process in [*running]:
                _end(process)
            raise
    _compile([*compiler, "-shared", "-pthread", *objects, "-o", str(target)], target.parent, running)


def _compile(command: Sequence[str], scratch: Path, running: set[subprocess.Popen[str]]) -> None:
    """Runs a compiler, which is in `running` while it does; its own scratch files are in `scratch`."""
    try:
        # A process group of its own: a Ctrl-C is meant for us, and no failure of the compiler.
        process = subprocess.Popen(
            command,
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**_english(), "TMPDIR": str(scratch)},
        )
    except OSError as error:
        raise _not_run(command, error) from None
    with process:
        running.add(process)
        try:
            said = process.communicate(timeout=_SECONDS)[1]
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} took more than {_SECONDS} s; the next start tries again") from None
        finally:
            _end(process)
            running.discard(process)
    _judge(command[0], process.returncode, said)


def _judge(compiler: str, code: int, said: str) -> None:
    """Raises Refused if the compiler failed by what it was given, Unavailable if it may succeed the next time."""
    if not code:
        return
    told = said.splitlines()
    line = next((line for line in told if "error" in line.lower()), told[0] if told else "")
    line = f": {_printable(line)}" if line else ""
    if code < 0:
        raise Unavailable(f"{compiler} was ended by signal {-code}; the next start tries again")
    if 126 <= code <= 192:  # a shell could not run it, or it was ended by a signal
        raise Unavailable(f"{compiler} ended with exit code {code}{line}; the next start tries again")
    if (passing := next((line for line in told if _PASSING.search(line)), None)) is not None:
        raise Unavailable(f"{compiler} failed: {_printable(passing)}; the next start tries again")
    raise Refused(f"{compiler} failed with exit code {code}{line}; {KNOWN}")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a compiler that still runs, with the programs that it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # what a compiler says is looked at


def _not_run(command: Sequence[str], error: OSError) -> Unavailable:
    # It is no program after all, or there is no memory for another process.
    return Unavailable(f"{command[0]} could not be run: {error.strerror}; set CXX to another compiler")


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in line.strip())[:400]


def digest(parts: Iterable[bytes]) -> str:
    """20 letters of the SHA-256 of these parts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:20]

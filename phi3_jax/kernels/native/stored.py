"""Libraries in the cache folder: each beside a record of its size and SHA-256, and checked before it is loaded.

The folder is private (phi3_jax.user_cache), so nobody else changes a file between the check and the loading; and our
own processes only ever put whole files into the place of others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MISSING = "is not there"
_LARGEST = 1 << 28  # bytes of a library; ours have less than one million
_SCRATCH = "build-"


def problem(library: Path) -> str | None:
    """Why the library must not be loaded: MISSING, or what is wrong with it; None if it is as it was made."""
    try:
        made = _read(library, _LARGEST)
    except FileNotFoundError:
        return MISSING
    except ValueError as error:
        return str(error)
    try:
        record = json.loads(_read(_record(library), 1000))
        size, digest = record["size"], record["sha256"]
    except FileNotFoundError:
        return "has no record of its SHA-256 beside it"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "has a damaged record of its SHA-256 beside it"
    if size != len(made):
        return f"has {len(made)} bytes rather than {size}"
    if digest != hashlib.sha256(made).hexdigest():
        return "has another SHA-256 than was recorded"
    return None


def keep(made: Path, library: Path) -> None:
    """Moves a library that was made in the same file system to its place; its record comes after it."""
    made.chmod(0o600)
    _sync(made)
    content = made.read_bytes()
    _clear(library)
    made.rename(library)
    _sync(library.parent)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(_record(library), json.dumps(record))


def failure(library: Path) -> str | None:
    """What `remember_failure` kept, with what to do to have it tried again; None if there is nothing."""
    path = library.with_suffix(".failed")
    try:
        text = _read(path, 2000).decode(errors="replace")
    except (FileNotFoundError, ValueError):
        return None
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return f"{text}; tried again once the compiler or a source is another, or {path} deleted" if text else None


def remember_failure(library: Path, text: str) -> None:
    """Keeps why the library could not be made; if that cannot be written, it is only tried once more."""
    with contextlib.suppress(OSError):
        _write(library.with_suffix(".failed"), text[:1000])


@contextlib.contextmanager
def locked(folder: Path, told: Callable[[str], None], seconds: float = 600) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back when a process ends; `told` hears of waiting for another.

    Raises TimeoutError after so many seconds.
    """
    import fcntl  # not on Windows

    path = folder / "lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags, 0o600), "r+", errors="replace") as file:
        end = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if end is None:
                    end = time.monotonic() + seconds
                    holder = file.read(20).strip()
                    told(f"waiting for process {holder or '(unknown)'}, which builds the CPU kernels and holds {path}")
                elif time.monotonic() > end:
                    raise TimeoutError(f"another process has held {path} for {seconds:.0f} s; end it") from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for a build, to be asked for while `folder` is locked; those of builds that were killed are removed."""
    for left in folder.parent.glob(f"*/{_SCRATCH}*"):
        # A build beside this one holds its folder's lock; a compiler may still write where its parent was killed.
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            if left.parent != folder:
                held.enter_context(locked(left.parent, told=lambda text: None, seconds=0))
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _record(library: Path) -> Path:
    return library.with_suffix(".json")


def _read(path: Path, largest: int) -> bytes:
    """A file's content. Raises ValueError, with the end of a sentence, if it is no file that could be ours."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode) or state.st_uid not in (os.geteuid(), 0) or state.st_mode & 0o022:
            raise ValueError("is not a file that only its user can have written")
        if state.st_size > largest:
            raise ValueError(f"is too large ({state.st_size} bytes)")
        with os.fdopen(number, "rb", closefd=False) as file:
            return file.read(largest)
    finally:
        os.close(number)


def _write(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, whatever happens."""
    with tempfile.NamedTemporaryFile("w", prefix=_SCRATCH, dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            _clear(path)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _sync(path.parent)


def _clear(path: Path) -> None:
    """Removes a folder that has the name of a file; a file would be replaced."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

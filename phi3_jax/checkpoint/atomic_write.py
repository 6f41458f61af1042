"""Files and folders that appear whole or not at all: written under another name beside their own, then renamed.

What will be called NAME is written in a folder of its own, which is removed afterwards:

    .NAME.0123abcd.partial/lock   the writing process, which keeps the file locked as long as it lives
    .NAME.0123abcd.partial/new    what becomes NAME

So the kernel tells what is still being written, in other containers, too, and whoever writes next to it removes what
kills have left. The digits stand for the machine since it was started: what another one writes to a shared disk, which
may not share locks, is left alone. On a disk without locks the folder itself is the lock, and nobody removes another's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.([0-9a-f]{8})\.partial", re.DOTALL)
_SHORT = re.compile(r"\d+ requested and \d+ written")  # what numpy says when the disk is full
_LOCK, _NEW = "lock", "new"
_PATIENCE = 1.0  # seconds, for one who removes what a kill has left under the name
_NO_REPLACE, _EXCHANGE = 1, 2  # RENAME_NOREPLACE, RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD
_reserved: set[Path] = set()  # by `reserved`, and not being written just now


@contextlib.contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Keeps other processes from writing a new file or folder, from before the work to what `new_file` and `new_folder`
    do inside; they, too, reserve what they write.

    Raises:
      FileExistsError: `target` is there already.
      OSError: another process is writing it; or it cannot be written.
    """
    _refuse_existing(target)
    with contextlib.ExitStack() as stack:
        with _explained(target, 0):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(_locked_partial(target, wait=False))
        _reserved.add(partial)
        try:
            yield
        finally:
            _reserved.discard(partial)


@contextlib.contextmanager
def new_file(target: Path, size: int = 0, *, overwrite: bool = False, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write to, which is renamed to `target` on success and removed otherwise.

    Args:
      size: bytes that will be written, where that is known.
      overwrite: replace a file that exists; it stays as it was if anything goes wrong. Who writes it at the same time
        is waited for.
      private: only its owner may read the file.

    Raises:
      FileExistsError: `target` is there already.
      OSError: it cannot be written, or another process is writing it, or there is not enough room for it.
    """
    if not overwrite:
        _refuse_existing(target)
    elif target.exists() and not target.is_file() and not target.is_dir():
        yield target  # a pipe or a terminal, for example /dev/stdout, which must not be replaced
        return
    with _explained(target, size):
        place = target.resolve() if overwrite else target  # a link stays one
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with _partial_of(place, wait=overwrite) as new:
            new.touch(0o600)
            _require_room(target, size)
            yield new
            new.chmod(0o600 if private else 0o666 & ~_umask())
            sync(new)
            if overwrite:
                os.replace(new, place)
            else:
                rename_new(new, place)
            sync(place.parent)


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """Yields a temporary folder to fill, which is renamed to `target` on success and removed otherwise.

    Args:
      size: bytes that will be written into it.

    Raises:
      FileExistsError: `target` is there already.
      OSError: it cannot be written, or another process is writing it, or there is not enough room for it.
    """
    _refuse_existing(target)
    with _explained(target, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target, size)
        with _partial_of(target, wait=False) as new:
            new.mkdir()
            yield new
            new.chmod(0o777 & ~_umask())
            for folder, _, names in os.walk(new, topdown=False):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            rename_new(new, target)
            sync(target.parent)


def remove_partials(folder: Path) -> None:
    """Removes from a folder what processes that are gone have left half written; others' work is not touched."""
    with contextlib.suppress(OSError):
        for path in [Path(entry.path) for entry in os.scandir(folder) if _PARTIAL.fullmatch(entry.name)]:
            _remove_if_left(path)


def _remove_if_left(partial: Path) -> None:
    found = _PARTIAL.fullmatch(partial.name)
    with contextlib.suppress(OSError):  # another's, which we may not write
        is_of_here = found is not None and (found[1] == _machine() or _is_of_before(partial))
        if is_of_here and not partial.is_symlink() and partial.stat().st_uid == os.geteuid():
            lock = _lock(partial)
            try:
                _remove(partial)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _partial_of(place: Path, wait: bool) -> Iterator[Path]:
    """Yields where to write what becomes `place`, where nothing is yet."""
    partial = _partial(place)
    if partial in _reserved:
        _reserved.discard(partial)
        try:
            yield partial / _NEW
        finally:
            _clear(partial)
            _reserved.add(partial)
        return
    with _locked_partial(place, wait):
        yield partial / _NEW


@contextlib.contextmanager
def _locked_partial(place: Path, wait: bool) -> Iterator[Path]:
    """Yields the folder in which `place` is made, empty and locked; it is removed in the end.

    Args:
      wait: for another process that writes `place`; otherwise that is an error.
    """
    remove_partials(place.parent)
    partial, until = _partial(place), time.monotonic() + _PATIENCE
    while True:
        try:
            lock = _lock(partial)
            break
        except BlockingIOError:
            if not wait and time.monotonic() > until:
                raise OSError(
                    f"{place}: {_process(partial)} is writing it; wait for that, or choose another name"
                ) from None
            time.sleep(0.02)
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()} {platform.node()}\n".encode())
        _clear(partial)
        yield partial
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
        os.close(lock)


def _lock(partial: Path) -> int:
    """Makes the folder if it is not there, and locks it -> an open file. Raises BlockingIOError if another has."""
    while True:
        is_new = False
        with contextlib.suppress(FileExistsError):
            partial.mkdir(0o700)
            is_new = True
        try:
            file = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # the process before us has just removed it
            continue
        try:
            if not _flock(file) and not is_new:
                raise OSError(
                    f"{partial}: of {_process(partial)}, which may still be writing there: this disk has no locks that "
                    "would tell; if it is not, remove that folder"
                )
            if os.path.samestat(os.fstat(file), os.stat(partial / _LOCK)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int) -> bool:
    """Locks an open file; False where its disk has no locks. Raises BlockingIOError if another process has it."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _writer(partial: Path) -> list[str]:
    """What the process that makes the folder says of itself: its number and its machine's name."""
    with contextlib.suppress(OSError):
        return (partial / _LOCK).read_text(encoding="utf-8", errors="replace")[:300].split()
    return []


def _is_of_before(partial: Path) -> bool:
    """Whether this machine has left it before it was started again; another one of its name would go on writing."""
    if platform.node() not in _writer(partial)[1:]:
        return False
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    started = time.time() - time.clock_gettime(clock)
    return all(path.lstat().st_mtime < started for path in (partial, *partial.rglob("*")))


def _process(partial: Path) -> str:
    found = _writer(partial)
    return "process {} on {}".format(*found) if len(found) == 2 else "another process"


def _clear(partial: Path) -> None:
    """Removes all but the lock."""
    for entry in os.scandir(partial):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != _LOCK:
            os.unlink(entry.path)


def _remove(partial: Path) -> None:
    """The lock goes last."""
    _clear(partial)
    (partial / _LOCK).unlink(missing_ok=True)
    partial.rmdir()


def _partial(place: Path) -> Path:
    return place.absolute().with_name(f".{place.name}.{_machine()}.partial")


def _machine() -> str:
    """Eight digits: the same in all containers of a machine, and others after it was started again."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def rename_new(new: Path, target: Path) -> None:
    """Unlike `os.rename`, replaces nothing: no empty folder either, and nothing that has just appeared.

    Raises:
      FileExistsError: `target` is there.
      OSError: it cannot be renamed.
    """
    if not _renameat2(new, target, _NO_REPLACE):
        _refuse_existing(target)
        os.rename(new, target)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once, so that both are always there; False where the file system does not know that."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), flags) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        _refuse_existing(other)
    return False  # whatever the reason: os.rename, which comes next, knows it or does not need it


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: so a power cut leaves nothing empty."""
    if path.is_symlink():
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems know none of folders.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(file)


@contextlib.contextmanager
def _explained(target: Path, size: int) -> Iterator[None]:
    """Adds what is written and the remedy to what the operating system says."""
    try:
        yield
    except OSError as error:
        # If it is not from the operating system, it names the file and the remedy already; and it may be of a file that
        # was read meanwhile.
        reason = f"{error}: is the disk full?" if _SHORT.fullmatch(str(error)) else error.strerror
        if reason is None or not _is_about(error, target):
            raise
        room = f", with {_shown(size)} left" if size else ""
        raise OSError(
            f"{target}: cannot be written ({reason}); name a file in a folder that is there and may be written to{room}"
        ) from error


def _is_about(error: OSError, target: Path) -> bool:
    """Whether what could not be done is writing to the target, to its partial folder or to one above."""
    if error.filename is None:
        return True
    path = Path(os.fsdecode(error.filename)).absolute()
    places = target.absolute(), target.resolve()
    return any(place.is_relative_to(path) or path.is_relative_to(_partial(place)) for place in places)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists already; choose another name, or remove it first")


def _require_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(f"{target}: takes {_shown(size)}, but only {_shown(free)} are free there")


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _umask() -> int:
    """The bits that this process takes from the permissions of new files; they can only be read by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

"""Files and folders that appear whole or not at all: written under another name beside their own, then renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(target: Path, size: int = 0, *, overwrite: bool = False, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write to, which is renamed to `target` on success and removed otherwise.

    Args:
      size: bytes that will be written, where that is known.
      overwrite: replace a file that exists; it stays as it was if anything goes wrong.
      private: only its owner may read the file.

    Raises:
      FileExistsError: `target` is there already.
      OSError: it cannot be written, or there is not enough room for it.
    """
    if not overwrite:
        _refuse_existing(target)
    elif target.exists() and not target.is_file() and not target.is_dir():
        yield target  # a pipe or a terminal, for example /dev/stdout, which must not be replaced
        return
    place = target.resolve() if overwrite else target  # a link stays one
    partial = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
        os.close(handle)
        partial = Path(name)
        _require_room(target, size)
        yield partial
        partial.chmod(0o600 if private else 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(partial, place)
    except OSError as error:
        if error.strerror is None:  # not from the operating system: it names the file and the remedy already
            raise
        room = f", with {_shown(size)} left" if size else ""
        raise OSError(
            f"{target}: cannot be written ({error.strerror}); name a file in a folder that is there and may be written "
            f"to{room}"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """Yields a temporary folder to fill, which is renamed to `target` on success and removed otherwise.

    Args:
      size: bytes that will be written into it.

    Raises:
      FileExistsError: `target` is there already.
      OSError: there is not enough room for it.
    """
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_room(target, size)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial(target: Path) -> None:
    """Removes what kills have left of a new file or folder; nobody may be writing it."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}-{'?' * 8}"):  # tempfile's names
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


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

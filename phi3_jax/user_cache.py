"""The user's cache folder: where it is, and that only this user could have put there what it holds.

Kernels and compiled programs are kept in it, and they are run: who can write there could have any code run by the user.
So the folder and those below it belong to the user, or to root as in the image of a container, and nobody else may
write there, but the group of this user alone.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


class UntrustedError(OSError):
    """Others could have put something into a folder whose contents are run; the text says which, and the remedy."""


def cache_folder(*names: str) -> Path:
    """The folder phi3_jax/`names` below XDG_CACHE_HOME, else ~/.cache; it need not exist.

    Raises OSError if neither is known. As the XDG specification demands, a relative XDG_CACHE_HOME is ignored.
    """
    return _base().joinpath("phi3_jax", *names)


def private_cache_folder(*names: str, told: Callable[[str], None]) -> Path:
    """The same, once it is there and private: folders that are missing are made, for the user alone.

    A folder of the user's to which others may write is replaced by an empty one: what it holds may be theirs. `told`
    gets a sentence about that. Raises UntrustedError if the folder cannot be made private, other OSErrors if it cannot
    be made at all.
    """
    base = _base()
    if not base.exists():
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_base(base)
    folder = base
    for name in ("phi3_jax", *names):
        folder = folder / name
        if not os.path.lexists(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        if _written_by_others(folder) and folder.lstat().st_uid == os.geteuid():
            _replace(folder)
            told(f"others could write to {folder}: what it held was removed, and it is private now")
        if _written_by_others(folder):
            raise UntrustedError(
                f"others may write to {folder}, whose contents are run, and that cannot be changed here; "
                f"set XDG_CACHE_HOME to a folder of your own, on a file system with permissions"
            )
    return folder


def close_to_others(folder: Path) -> None:
    """Takes from others the right to read a folder of the user's and those above it, as far as they are phi3_jax's."""
    levels = (folder, *folder.parents)
    for level in levels[: levels.index(cache_folder()) + 1]:
        state = level.lstat()
        if state.st_uid == os.geteuid() and state.st_mode & 0o077:
            level.chmod(0o700)


def check_private(folder: Path) -> None:
    """Raises UntrustedError if someone but the user and root may write to the folder, which the user has named."""
    if _written_by_others(folder.resolve()):
        raise UntrustedError(f"others may write to {folder}, whose contents are run; do: chmod go-w {folder}")


def _base() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    if not os.path.isabs(base) or (base != given and os.environ.get("HOME") == ""):
        raise FileNotFoundError("there is no home folder; set XDG_CACHE_HOME to the absolute path of a folder of yours")
    return Path(base)


def _check_base(base: Path) -> None:
    """Who may write to the folder above ours could put another in its place, unless the sticky bit is set."""
    state = base.stat()
    if state.st_uid not in (os.geteuid(), 0):
        raise UntrustedError(f"{base} belongs to user {state.st_uid}; set XDG_CACHE_HOME to a folder of your own")
    if _others_may_write(state) and not state.st_mode & stat.S_ISVTX:
        raise UntrustedError(
            f"others may write to {base}, and so could replace what is kept there and run; "
            f"do: chmod go-w {base}, or set XDG_CACHE_HOME to another folder"
        )


def _written_by_others(folder: Path) -> bool:
    """Whether others may write to the folder. Raises UntrustedError if it is theirs, or no folder."""
    state = folder.lstat()
    if stat.S_ISLNK(state.st_mode):
        raise UntrustedError(f"{folder} is a symbolic link; remove it, and set XDG_CACHE_HOME to keep caches elsewhere")
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder; remove it, or set XDG_CACHE_HOME elsewhere")
    if state.st_uid not in (os.geteuid(), 0):
        raise UntrustedError(f"{folder} belongs to user {state.st_uid}; set XDG_CACHE_HOME to a folder of your own")
    return _others_may_write(state)


def _others_may_write(state: os.stat_result) -> bool:
    return bool(state.st_mode & (stat.S_IWOTH | (0 if _is_of_user_alone(state.st_gid) else stat.S_IWGRP)))


def _is_of_user_alone(group: int) -> bool:
    """Whether it is the group of the user's number or name that many systems give to each user, without others in it.

    With such groups, folders are often writable by the group.
    """
    import grp  # not on Windows
    import pwd

    user = os.geteuid()
    try:
        name, found = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:  # as in many a container
        return group == user
    return (group == user or found.gr_name == name) and set(found.gr_mem) <= {name}


def _replace(folder: Path) -> None:
    """Puts a new, private folder into the place of one; whoever holds the old one open has no part in the new."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(aside)  # over an empty folder
    folder.mkdir(mode=0o700, exist_ok=True)
    aside.chmod(0o700)
    shutil.rmtree(aside, ignore_errors=True)

"""Programs that jax has compiled, kept for the next start: where, and what happens to damaged ones.

jax runs what it finds there, so the folder is as private as that of the kernels.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import jax

from phi3_jax import user_cache

# jax reads a whole entry at once, whatever it is: from a pipe it would wait for ever, a device would fill the memory.
_LARGEST = 2**30  # bytes; the programs of the largest models have a few million

# What jax warns of. Its module's name is how the name of an entry's file begins.
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(?P<module>[\w.<>-]+)': ")
_NOT_WRITTEN = re.compile(r"Error writing persistent compilation cache entry for '[^']*': (?:\w+: )?(?P<error>.*)")


def default_folder() -> str:
    """Where they are kept if the user does not say where; empty, for nowhere, if there is no home."""
    try:
        return str(user_cache.cache_folder("compiled"))
    except OSError:
        return ""


def keep(folder: str, told: Callable[[str], None]) -> None:
    """Has jax keep them in `folder`, which is made; if it is not a safe place they are not kept, which `told` hears."""
    try:
        if folder == default_folder():
            user_cache.private_cache_folder("compiled", told=told)
        elif "://" not in folder:  # not in a bucket
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            user_cache.check_private(Path(folder))
        if "://" not in folder:
            _remove_what_is_no_program(folder, told)
    except OSError as error:
        told(f"compiled programs are not kept, so each start compiles them: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # Keep small compiled programs, too: a start compiles dozens of them, which together takes seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_what_is_no_program(folder: str, told: Callable[[str], None]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith("-cache"):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:  # a link to nowhere, or another process was faster: jax takes both for missing
                continue
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
                told(f"{entry.path} is not a compiled program, and was removed")
                os.rmdir(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def repair(warning: str) -> str:
    """What to say instead of a warning; where it tells of a damaged entry, that is removed, so that jax makes it anew.

    jax itself compiles the program, but leaves the damaged entry where it is, and so warns at each start.
    """
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)  # mypy does not see it
    if folder and (found := _UNREADABLE.match(warning)):
        for path in Path(folder).glob("*-cache"):
            if path.name.startswith(f"{found['module']}-"):
                with contextlib.suppress(OSError):
                    path.unlink()
        return f"damaged entries among the compiled programs in {folder} were removed, and are compiled again"
    if folder and (found := _NOT_WRITTEN.match(warning)):
        return f"compiled programs cannot be kept in {folder}: {found['error']}"
    return warning

"""Programs that jax has compiled, kept for the next start: where, and what happens to damaged ones.

jax runs what it finds there, so the folder is as private as that of the kernels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import jax

from phi3_jax import user_cache

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
    except OSError as error:
        told(f"compiled programs are not kept, so each start compiles them: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # Keep small compiled programs, too: a start compiles dozens of them, which together takes seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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

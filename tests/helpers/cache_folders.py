"""Cache folders of tests' own."""

from pathlib import Path

from phi3_jax.kernels.native import build

_KERNELS = build.cache_folder()  # asked for before a test sets another XDG_CACHE_HOME


def own_cache(folder: Path) -> str:
    """Makes `folder` fit for XDG_CACHE_HOME: only the kernels are there already, because compiling them takes long."""
    _KERNELS.mkdir(parents=True, exist_ok=True)
    build.why_unavailable()  # compiles them
    (folder / "phi3_jax").mkdir()
    (folder / "phi3_jax" / "kernels").symlink_to(_KERNELS)
    return str(folder)

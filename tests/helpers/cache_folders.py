"""Cache folders of tests' own."""

import shutil
from pathlib import Path

from phi3_jax import kernels
from phi3_jax.kernels.native import build


def own_cache(folder: Path) -> str:
    """Makes `folder` fit for XDG_CACHE_HOME: only the kernels are there already, because compiling them takes long."""
    if kernels.why_unavailable() is None:
        made = Path(build.library()._name).parent
        for name in ("phi3_jax", "kernels"):
            folder = folder / name
            folder.mkdir(mode=0o700)
        shutil.copytree(made, folder / made.name)
        folder = folder.parent.parent
    return str(folder)

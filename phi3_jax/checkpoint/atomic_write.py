"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder to fill that becomes `target` if all goes well, and vanishes otherwise.

    Args:
      size: bytes that will be written into it.

    Raises:
      FileExistsError: `target` is there already.
      OSError: there is not enough room for it.
    """
    if target.exists():
        raise FileExistsError(f"{target}: exists already; name a new folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(f"{target}: the files take {size / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there")
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

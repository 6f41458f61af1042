"""Files that are files: a pipe, a device or a folder where a file belongs is refused before it can block a reader."""

import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

_OPEN = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")


def require_regular(path: Path) -> None:
    """Raises ValueError, naming what `path` is, unless it is a file or a link to one; FileNotFoundError stays itself.

    Nothing is opened: opening a pipe waits for whoever writes to it, and a device may never end. A pipe that is open
    already, as a shell's <(...) and | /dev/stdin, passes: its writer is known.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFIFO and str(path).startswith(_OPEN):
        return
    if kind != stat.S_IFREG:
        raise ValueError(f"{path}: is {KINDS.get(kind, 'no regular file')}; a regular file is needed here")

"""Files that are files: a pipe, a device or a folder where a file belongs is refused before it can block a reader.

And texts, which may come through a pipe, but must have an end.
"""

import io
import os
import stat
from pathlib import Path

_LONGEST_TEXT = 1 << 30  # bytes; /dev/zero is longer
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


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file or pipe. Raises ValueError if it is not UTF-8 or has no end, OSError if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(_LONGEST_TEXT + 1)
    if len(data) > _LONGEST_TEXT:
        raise ValueError(f"{path}: longer than {_LONGEST_TEXT} bytes; name a shorter text")
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # with \n for \r\n
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}); convert it") from None

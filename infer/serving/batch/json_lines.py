"""Files of JSON lines, read strictly: one object a line, in UTF-8."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from phi3_jax.json_files import parse
from phi3_jax.regular_file import require_regular

Line = TypeVar("Line")
_MOST_REPORTED = 10  # bad lines
_LONGEST_LINE = 1 << 25  # bytes; the longest contexts are some megabytes


@dataclasses.dataclass
class LineFile:
    """A file of JSON lines.

    Attributes:
      name: what errors call it.
      open: opens it for reading bytes.
    """

    name: str
    open: Callable[[], BinaryIO]

    def read(self, read: Callable[[int, bytes, int], Line], advice: str) -> list[Line]:
        """Reads every line that is not blank by `read(number from 1 on, bytes, index)`.

        Args:
          read: raises ValueError for a line that cannot be used.
          advice: what lines have to look like, said behind the reasons.

        Raises:
          ValueError: there are no lines, or some cannot be used; names up to ten of these with the reasons.
        """
        lines: list[Line] = []
        bad: list[str] = []
        for number, raw in self.numbered():
            try:
                lines.append(read(number, raw, len(lines)))
            except ValueError as error:
                bad.append(f"{self.name}:{number}: {error}")
        if bad:
            more = [f"and {len(bad) - _MOST_REPORTED} more"] if len(bad) > _MOST_REPORTED else []
            raise ValueError("\n".join([*bad[:_MOST_REPORTED], *more, advice]))
        if not lines:
            raise ValueError(f"{self.name}: holds no requests; write one JSON object per line")
        return lines

    def numbered(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank. Raises ValueError at one that is too long, before it is read whole."""
        with self.open() as file:
            for number in itertools.count(1):
                line = file.readline(_LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > _LONGEST_LINE:
                    raise ValueError(
                        f"{self.name}:{number}: the line is longer than {_LONGEST_LINE} bytes; write one JSON object "
                        "per line, with a prompt that fits the model's context"
                    )
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line


def open_file(path: str | os.PathLike[str]) -> LineFile:
    """A file on this machine. Raises FileNotFoundError, or ValueError for what is no file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; name a file with one JSON object per line")
    require_regular(Path(path))
    return LineFile(str(path), lambda: open(path, "rb"))


def check_id(first_with_id: dict[Any, int], key: str, value: Any, line: int) -> None:
    """Raises ValueError if another line has this id, too."""
    if (first := first_with_id.setdefault(value, line)) != line:
        raise ValueError(f"{key}={shown(value)} is the id of line {first}, too")


def parse_object(raw: bytes) -> dict[str, Any]:
    """One line as a JSON object. Raises ValueError."""
    value = parse(raw)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in an error, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

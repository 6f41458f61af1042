"""What can be fuzzed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The parts of what was read, by name, each as a hash or a value that JSON knows.
Read = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
      make: writes a valid input into an empty folder; called with the folder and a variant's number.
      read: reads the folder by the path that users run; called with the folder and the variant's number. "weights" in
        the result is what a change to a header may not change in silence; "told" is set where damage was told by a
        warning, and what was read is sound.
      variants: how many different inputs `make` makes.
      files: a pattern of files -> how often they are mutated, compared with the others. Other files are not.
      cost: how many times longer an input takes than one of a cheap reader; it is tried less often.
      strict: "file" or "file:key" of JSON that describes how numbers are laid out, like a header.
      checksums: whether we wrote the file ourselves with checksums: a changed byte of data must be told.
      names: words of which an error may have one instead of the file's name, where the input reaches the reader without
        it; "" is in every error.
      lines: how many lines an error may have.
      is_file: whether users name the file, which may then be a pipe, a folder or huge; else only its contents change.
      is_bounded: whether files beyond some size are refused; of data to train on, none are.
      seconds, memory: how long reading may take, and how many bytes more, where that is more than for others.
    """

    make: Callable[[Path, int], None]
    read: Callable[[Path, int], Read]
    variants: int = 1
    files: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"*": 1.0})
    cost: float = 1
    strict: tuple[str, ...] = ()
    checksums: bool = False
    names: tuple[str, ...] = ()
    lines: int = 1
    is_file: bool = True
    is_bounded: bool = True
    seconds: float = 0
    memory: float = 0


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change that was made.

    Attributes:
      file: its name in the folder.
      place: "header" for what says where and how large things are: no change of it may change numbers in silence;
        "data" for the numbers; "settings" for what may be another valid value, "file" for what the file is.
      kind: of the change, in a word or two.
      detail: where, and what.
    """

    file: str
    place: str
    kind: str
    detail: str

"""What came of a mutated input: fine, or a fault and of which kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .reader import Mutation, Read, Reader

# What programs show as one line (command_line/program.py); all else they show as a traceback.
REFUSALS = (ValueError, OSError, ImportError)
FINE = ("same", "refused", "told", "other")
FAULTS = ("silent", "traceback", "vague", "crash", "hang", "memory")
MEMORY = 300e6  # bytes, and
TIMES_THE_FILE = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a worker tells.

    Attributes:
      read: what was read, or None.
      error: class of the exception; is_refusal: whether programs show it as a line; message, trace: its texts.
      seconds, memory: what reading took.
    """

    read: Read | None
    error: str = ""
    is_refusal: bool = False
    message: str = ""
    trace: str = ""
    seconds: float = 0
    memory: float = 0


def most_memory(size: float) -> float:
    """The bytes that reading an input of this size may take."""
    return TIMES_THE_FILE * size + MEMORY


def judge(
    outcome: Outcome, mutation: Mutation, reader: Reader, valid: Read, size: float, place: str
) -> tuple[str, str]:
    """A verdict of FINE or FAULTS, and what there is to say about it.

    Args:
      valid: what reading the valid input gave.
      size: of the valid input, in bytes.
      place: the folder of the input.
    """
    if outcome.memory > most_memory(size) + reader.memory:
        return "memory", f"{outcome.memory / 1e6:.0f} MB for an input of {size / 1e6:.2f} MB"
    if outcome.error:
        return _of_error(outcome, mutation, reader, place)
    assert outcome.read is not None
    read = {name: part for name, part in outcome.read.items() if name != "told"}
    if outcome.read.get("told"):
        return "told", str(outcome.read["told"])[:200]
    if read == valid:
        return "same", ""
    names = ", ".join(sorted(name for name in read.keys() | valid.keys() if read.get(name) != valid.get(name)))
    if mutation.place == "header" and read.get("weights") != valid.get("weights"):
        return "silent", f"other {names}"
    if mutation.place in ("header", "data") and reader.checksums:
        return "silent", f"other {names}, in spite of checksums"
    return "other", names


def _of_error(outcome: Outcome, mutation: Mutation, reader: Reader, place: str) -> tuple[str, str]:
    if not outcome.is_refusal:
        return "traceback", f"{outcome.error}: {outcome.message[:300]}"
    lines = outcome.message.strip().splitlines()
    if not 1 <= len(lines) <= reader.lines:
        return "vague", f"{len(lines)} lines: {outcome.message[:300]!r}"
    if len(outcome.message) > 2000 * reader.lines:
        return "vague", f"{len(outcome.message)} characters: {outcome.message[:200]!r}"
    if not any(name in outcome.message for name in (place, Path(mutation.file).name, *reader.names)):
        return "vague", f"names no file: {outcome.error}: {outcome.message[:300]!r}"
    return "told" if reader.checksums and mutation.place == "data" else "refused", ""


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """As JSON."""
    return dataclasses.asdict(outcome)

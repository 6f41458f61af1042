"""What became of a data file's entries: counted while they are read, and told in one line."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from .examples import Example

_REASONS_KEPT = 1000


@dataclasses.dataclass(frozen=True)
class Report:
    """Statistics of a data set that was prepared.

    Attributes:
      texts, rows, tokens: how many; of a preference both answers count.
      learned_tokens: how many of the tokens the model is to predict.
      efficiency: the share of the rows that is not padding.
      bad_lines: how many lines, or entries of other files, were left out.
      reasons: (line number, what is wrong with it) of the first of them.
      ignored_fields: names of fields in the file that are not used.
      converted: (from what to what, how many lines).
      spelled: how many lines of plain text spell special tokens, which are trained on as characters.
      first_spelled: of the first of these: where, and which token.
    """

    texts: int
    rows: int
    tokens: int
    learned_tokens: int
    efficiency: float
    bad_lines: int
    reasons: tuple[tuple[int, str], ...]
    ignored_fields: tuple[str, ...]
    converted: tuple[tuple[str, int], ...] = ()
    spelled: int = 0
    first_spelled: tuple[str, str] | None = None


class Tally:
    """Counts while a file is read."""

    def __init__(self) -> None:
        self.bad_lines = 0
        self.reasons: list[tuple[int, str]] = []
        self.spelled = 0
        self.first_spelled: tuple[str, str] | None = None
        self._unused: set[str] = set()
        self._converted: Counter[str] = Counter()

    def refuse(self, number: int, reason: str) -> None:
        """A line is left out."""
        self.bad_lines += 1
        if len(self.reasons) < _REASONS_KEPT:
            self.reasons.append((number, reason))

    def add(self, where: str, example: Example) -> None:
        """A line is used."""
        self._unused |= example.unused
        self._converted.update(example.converted)
        if example.spelled:
            self.spelled += 1
            self.first_spelled = self.first_spelled or (where, example.spelled)

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Names of fields that were not used."""
        return tuple(sorted(self._unused))

    @property
    def converted(self) -> tuple[tuple[str, int], ...]:
        """(from what to what, how many lines), the most first."""
        return tuple(sorted(self._converted.items(), key=lambda each: (-each[1], each[0])))


def tell(counts: Report | Tally) -> str:
    """What was converted, not used and left out, to be put behind other words; "" if nothing."""
    text = ""
    for lines, group in itertools.groupby(counts.converted, lambda each: each[1]):
        text += f"; {lines} lines: {', '.join(what for what, _ in group)}"
    if counts.ignored_fields:
        text += f"; not used are the fields {', '.join(counts.ignored_fields)}"
    if counts.bad_lines:
        number, reason = counts.reasons[0]
        text += f"; {counts.bad_lines} lines left out, as line {number}: {reason}"
    if counts.first_spelled is not None:
        where, token = counts.first_spelled
        text += f"; WARNING: {counts.spelled} lines, the first of them {where}, spell special tokens such as {token} "
        text += "as characters, which is how they are learned; parse_special=true makes them tokens"
    return text

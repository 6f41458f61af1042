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
      lines: how many lines, or entries of other files, are used.
      texts, rows, tokens: how many; of a preference both answers count.
      learned_tokens: how many of the tokens the model is to predict.
      efficiency: the share of the rows that is not padding.
      bad_lines: how many lines cannot be used and were left out.
      reasons: (line number, what is wrong with it) of the first of them.
      ignored_fields: names of fields in the file that are not used.
      converted: (from what to what, how many lines).
      spelled: how many lines of plain text spell special tokens, which are trained on as characters.
      first_spelled: of the first of these: where, and which token.
      cut, tokens_cut: how many lines were cut to the length of a row, and the tokens that they lost.
      too_long: how many lines were skipped because they are longer than a row.
      too_long_reasons: as `reasons`, of these.
    """

    lines: int
    texts: int
    rows: int
    tokens: int
    learned_tokens: int
    efficiency: float
    bad_lines: int
    reasons: tuple[tuple[int, str], ...]
    ignored_fields: tuple[str, ...]
    converted: tuple[tuple[str, int], ...]
    spelled: int
    first_spelled: tuple[str, str] | None
    cut: int
    tokens_cut: int
    too_long: int
    too_long_reasons: tuple[tuple[int, str], ...]


class Tally:
    """Counts while a file is read."""

    def __init__(self) -> None:
        self.lines = self.bad_lines = self.spelled = self.cut = self.tokens_cut = self.too_long = 0
        self.reasons: list[tuple[int, str]] = []
        self.too_long_reasons: list[tuple[int, str]] = []
        self.first_spelled: tuple[str, str] | None = None
        self._unused: set[str] = set()
        self._converted: Counter[str] = Counter()

    def refuse(self, number: int, reason: str) -> None:
        """A line is left out because it cannot be used."""
        self.bad_lines += 1
        if len(self.reasons) < _REASONS_KEPT:
            self.reasons.append((number, reason))

    def skip(self, number: int, reason: str) -> None:
        """A line is left out because it is longer than a row."""
        self.too_long += 1
        if len(self.too_long_reasons) < _REASONS_KEPT:
            self.too_long_reasons.append((number, reason))

    def add(self, where: str, example: Example) -> None:
        """A line is used."""
        self.lines += 1
        self._unused |= example.unused
        self._converted.update(example.converted)
        if example.spelled:
            self.spelled += 1
            self.first_spelled = self.first_spelled or (where, example.spelled)
        if example.tokens_cut:
            self.cut += 1
            self.tokens_cut += example.tokens_cut

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Names of fields that were not used."""
        return tuple(sorted(self._unused))

    @property
    def converted(self) -> tuple[tuple[str, int], ...]:
        """(from what to what, how many lines), the most first."""
        return tuple(sorted(self._converted.items(), key=lambda each: (-each[1], each[0])))

    def report(self, texts: int, rows: int, tokens: int, learned_tokens: int, efficiency: float) -> Report:
        """What was counted, with what else is known."""
        return Report(
            lines=self.lines,
            texts=texts,
            rows=rows,
            tokens=tokens,
            learned_tokens=learned_tokens,
            efficiency=efficiency,
            bad_lines=self.bad_lines,
            reasons=tuple(self.reasons),
            ignored_fields=self.ignored_fields,
            converted=self.converted,
            spelled=self.spelled,
            first_spelled=self.first_spelled,
            cut=self.cut,
            tokens_cut=self.tokens_cut,
            too_long=self.too_long,
            too_long_reasons=tuple(self.too_long_reasons),
        )


def tell(counts: Report | Tally) -> str:
    """What was cut, converted, not used and left out, to be put behind other words; "" if nothing."""
    text = ""
    if counts.cut:
        text += f"; {counted(counts.cut, 'line')} cut, which lost {counted(counts.tokens_cut, 'token')}"
    if counts.too_long:
        number, reason = counts.too_long_reasons[0]
        text += f"; {counted(counts.too_long, 'line')} longer than a row skipped, as line {number}: {reason}"
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


def counted(count: int, noun: str) -> str:
    """ "1 line", "2 lines"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"

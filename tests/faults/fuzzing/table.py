"""The results as a table, and the faults one by one."""

from __future__ import annotations

from collections import Counter, defaultdict

from .pool import Result
from .verdicts import FAULTS, FINE


class Table:
    """Collects results.

    Attributes:
      counts: of each verdict, for each reader.
      faults: the results that are faults.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._slowest: dict[str, float] = defaultdict(float)
        self._largest: dict[str, float] = defaultdict(float)
        self.faults: list[Result] = []

    def add(self, result: Result) -> None:
        self.counts[result.reader][result.verdict] += 1
        self._slowest[result.reader] = max(self._slowest[result.reader], result.seconds)
        self._largest[result.reader] = max(self._largest[result.reader], result.memory)
        if result.verdict in FAULTS:
            self.faults.append(result)

    def kinds(self) -> dict[tuple[str, ...], list[Result]]:
        """The faults, those together that look alike."""
        found: dict[tuple[str, ...], list[Result]] = defaultdict(list)
        for fault in self.faults:
            shape = fault.where or fault.kind
            found[(fault.reader, fault.verdict, shape)].append(fault)
        return dict(sorted(found.items()))

    def lines(self) -> list[str]:
        """The table."""
        rows = [["reader", "inputs", *FINE, *FAULTS, "slowest s", "peak MB"]]
        rows += [self._row(name, [name]) for name in sorted(self.counts)]
        rows.append(self._row("all", list(self.counts)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    def _row(self, title: str, readers: list[str]) -> list[str]:
        counts = sum((self.counts[name] for name in readers), Counter[str]())
        slowest = max((self._slowest[name] for name in readers), default=0)
        largest = max((self._largest[name] for name in readers), default=0)
        verdicts = [str(counts[verdict]) for verdict in (*FINE, *FAULTS)]
        return [title, str(counts.total()), *verdicts, f"{slowest:.2f}", f"{largest / 1e6:.0f}"]


def describe(fault: Result, command: str) -> str:
    """One fault, and how to see it again."""
    lines = [
        f"{fault.verdict}: {fault.reader}, {fault.file}, {fault.place}: {fault.kind} ({fault.detail})",
        f"    {fault.why}",
        *([f"    at {fault.where}"] if fault.where else []),
        f"    {command} --reader '{fault.reader}' --seed {fault.seed}",
    ]
    return "\n".join(lines)

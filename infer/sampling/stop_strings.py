"""Finds stop strings in a text that arrives in pieces, even if one is spread over several pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopWatch:
    """Passes a text through until one of the stop strings appears in it. Raises ValueError for an empty one.

    Attributes:
      stopped: whether one has appeared; only the text before it has been passed on.
    """

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty; it would end every answer at once")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Adds a piece -> the text that is now certain not to be (the beginning of) a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """At the end of the text: what was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of the text with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

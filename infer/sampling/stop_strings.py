"""Finds stop strings in a text that arrives in pieces, even if one is spread over several pieces."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np

from phi3_jax.text import Tokenizer

# Of each tokenizer, for the stop strings that were used lately: it takes some tenths of a second to find out. Weak
# references, so that a tokenizer can be freed.
_watched: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[tuple[str, ...], int], np.ndarray]] = (
    weakref.WeakKeyDictionary()
)
_MOST_KNOWN = 16


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """One stop string, several or none. Raises ValueError for others than text, and for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if odd := [each for each in stops if not isinstance(each, str)]:
        raise ValueError(f"stop strings are text, not {odd[0]!r}")
    if not all(stops):
        raise ValueError("a stop string is empty; it would end every answer at once")
    return stops


class StopWatch:
    """Passes a text through until one of the stop strings appears in it. Raises ValueError as `stop_strings`.

    Attributes:
      stopped: whether one has appeared; only the text before it has been passed on.
    """

    def __init__(self, stops: str | Iterable[str] | None):
        self._stops = stop_strings(stops)
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


def watched_tokens(stops: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """What every token may have to do with the stop strings, whatever text it is in: uint8 [vocab_size], a sum.

    1: the token may hold all of one. 2: it may complete one that begins in the tokens before. 4: one may begin in it,
    or go through it, and be completed by the next token. So a stop string is complete only after a token with 1, or
    after one with 2 that follows one with 4.
    """
    known = _watched.setdefault(tokenizer, {})
    key = tuple(stops), vocab_size
    if key not in known:
        if len(known) == _MOST_KNOWN:
            known.clear()
        known[key] = _marks(stops, tokenizer, vocab_size)
    return known[key]


def _marks(stops: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    if any("\ufffd" in stop for stop in stops):  # it may stand for any bytes
        return np.full(vocab_size, 1, np.uint8)
    marks = np.zeros(vocab_size, np.uint8)
    if not stops:
        return marks
    wanted = [stop.encode("utf-8", "surrogatepass") for stop in stops]
    ends = tuple({stop[i:] for stop in wanted for i in range(1, len(stop))})
    beginnings = tuple({stop[:i] for stop in wanted for i in range(1, len(stop))})
    for i in range(min(vocab_size, tokenizer.vocab_size)):
        # A special token prints nothing: what it stands in may go through it.
        token = b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i)
        inside = token.endswith(beginnings) or any(token in stop for stop in wanted)
        marks[i] = any(stop in token for stop in wanted) + 2 * token.startswith(ends) + 4 * inside
    return marks


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of the text with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

"""Finds stop strings in a text that arrives in pieces, even if one is spread over several pieces."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence

import numpy as np

from phi3_jax.text import Tokenizer

# Weak references, so that a tokenizer can be freed, and its bytes with it.
_token_bytes: weakref.WeakKeyDictionary[Tokenizer, list[bytes]] = weakref.WeakKeyDictionary()


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


def completing_tokens(stops: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """The tokens that may complete a stop string, whatever stands before them: bool [vocab_size].

    Those that begin with an end of one, or hold all of it. No other token does.
    """
    if any("\ufffd" in stop for stop in stops):  # it may stand for any bytes
        return np.ones(vocab_size, bool)
    mask = np.zeros(vocab_size, bool)
    if not stops:
        return mask
    if tokenizer not in _token_bytes:
        _token_bytes[tokenizer] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    wanted = [stop.encode("utf-8", "surrogatepass") for stop in stops]
    ends = {stop[i:] for stop in wanted for i in range(len(stop))}
    has_last_byte = re.compile(b"[" + b"".join(re.escape(stop[-1:]) for stop in wanted) + b"]")  # few tokens have
    for i, token in enumerate(_token_bytes[tokenizer][:vocab_size]):
        if has_last_byte.search(token):
            begins = any(token[:length] in ends for length in range(1, len(token) + 1))
            mask[i] = begins or any(stop in token for stop in wanted)
    return mask


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of the text with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

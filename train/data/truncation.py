"""Chats, completions and preferences that are longer than a row: skipped, cut, or without their oldest turns.

The two texts of a preference lose the same, so that their prompts stay equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from phi3_jax.text import Tokenizer

from .forms import Chat, Plain
from .messages import Message, shared

_SYSTEM = ("system", "developer")


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens int32 [n], and learned bool [n]: which of them the model is to predict. The first one is never learned."""

    tokens: np.ndarray
    learned: np.ndarray


class TooLongError(ValueError):
    """A line is longer than a row and is to be skipped."""


def too_long(texts: Sequence[Text], length: int, truncate: str) -> ValueError:
    """The error of a line that is longer than a row: one that stops the run, if that is wanted."""
    longest = max(len(text.tokens) for text in texts)
    told = f"it has {longest} tokens, more than a row (sequence_length={length})"
    if truncate == "stop":
        return ValueError(f"{told}; raise sequence_length, or set truncate=left, turns or skip")
    return TooLongError(told)


def cut_left(texts: Sequence[Text], borders: Sequence[int], length: int, tokenizer: Tokenizer) -> list[Text]:
    """Cuts tokens from the beginning, behind a bos token, equally many from each text.

    Args:
      borders: where in each text its last answer begins. This stays whole, and at least one token before it.

    Raises:
      TooLongError: an answer is too long for that.
    """
    opening: list[int | None] = [*tokenizer.opening] or [tokenizer.bos_id]
    kept = len(opening) if list(texts[0].tokens[: len(opening)]) == opening else 0
    end = kept + max(len(text.tokens) for text in texts) - length
    if end >= min(borders):
        raise TooLongError(f"its answer leaves no room for anything before it in a row (sequence_length={length})")
    if any(not np.array_equal(text.tokens[:end], texts[0].tokens[:end]) for text in texts):
        raise TooLongError("its two answers have prompts that differ in the tokens that would have to be cut")
    cut = []
    for text in texts:
        learned = np.concatenate([text.learned[:kept], text.learned[end:]])
        learned[: kept + 1] = False  # what stood before this token is not there any more
        cut.append(Text(np.concatenate([text.tokens[:kept], text.tokens[end:]]), learned))
    return cut


def leave_out_turns(forms: Sequence[Chat | Plain], encode: Callable[[Chat], Text], length: int) -> list[Text]:
    """Leaves out as few as possible of the oldest exchanges, and encodes what is left.

    An exchange begins with a message of the user and has all before the next: answers, calls of tools and their
    results. System messages at the beginning stay, and the last exchange with something learned.

    Raises:
      TooLongError: that is still longer than a row, or nothing is learned in it; or the text is not a chat.
    """
    chats = [form for form in forms if isinstance(form, Chat)]
    if len(chats) < len(forms):
        raise TooLongError("it is plain text, which has no turns that could be left out; truncate=left cuts its prompt")
    messages = chats[0].messages
    head = next((i for i, each in enumerate(messages) if each.fields["role"] not in _SYSTEM), len(messages))
    starts = [start for start in _exchanges(messages, head) if start > head]
    if len(chats) == 2:  # both keep their replies
        starts = [start for start in starts if start < shared(chats[0].messages, chats[1].messages)]

    def without(start: int) -> list[Text]:
        left = [dataclasses.replace(chat, messages=chat.messages[:head] + chat.messages[start:]) for chat in chats]
        if not all(any(each.learned for each in chat.messages) for chat in left):
            return []
        return [encode(chat) for chat in left]

    # The more is left out the shorter it gets: the first start that suffices is found by halving.
    found: list[Text] = []
    while starts:
        middle = len(starts) // 2
        texts = without(starts[middle])
        fits = all(len(text.tokens) <= length for text in texts)  # also where nothing learned is left
        found = texts if fits and texts else found
        starts = starts[:middle] if fits else starts[middle + 1 :]
    if not found:
        raise TooLongError(f"also its last turn alone is longer than a row (sequence_length={length})")
    return found


def _exchanges(messages: Sequence[Message], head: int) -> list[int]:
    """Where exchanges begin: at messages of the user that follow others, and at system messages before these."""
    starts = []
    for i in range(head, len(messages)):
        if messages[i].fields["role"] == "user" and (i == head or messages[i - 1].fields["role"] != "user"):
            start = i
            while start > head and messages[start - 1].fields["role"] in _SYSTEM:
                start -= 1
            starts.append(start)
    return starts

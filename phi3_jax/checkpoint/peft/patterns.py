"""Regular expressions of files, matched against names in time that no expression can blow up.

Python's own `re` tries one way after another, which takes 2 ** 40 steps for "(a+)+x" on a name of 40 letters. Here an
expression that `re` has parsed maps the set of places in the name where it may begin to the set where it may end. That
gives the same answer to "does all of it match?", for all that `re` has but back references, possessive and atomic
parts, conditions and ignored case.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 10_000  # characters: each module of 32 layers fits, written out
_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_PLACES = {
    codes.AT_BEGINNING: r"\A",
    codes.AT_BEGINNING_STRING: r"\A",
    codes.AT_BOUNDARY: r"\b",
    codes.AT_NON_BOUNDARY: r"\B",
    codes.AT_END: r"\Z",
    codes.AT_END_STRING: r"\Z",
}


class Steps:
    """How many steps may be taken for all names and patterns of one file: a few seconds."""

    def __init__(self, left: int = 2_000_000) -> None:
        self._left = left

    def take(self, count: int = 1) -> None:
        """Raises ValueError if there are no more."""
        self._left -= count
        if self._left < 0:
            raise ValueError("names and patterns that take too long to match: write the names out, fewer of them")


def matches(pattern: str, name: str, steps: Steps | None = None) -> bool:
    """Whether all of the name matches, as `re.fullmatch` says.

    Raises:
      ValueError: it is no regular expression, has parts that are not computed here, or takes too many steps.
    """
    return len(name) in _Matcher(name, steps or Steps()).ends(_parsed(pattern), 0)


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    if len(pattern) > _LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} characters is longer than {_LONGEST}: write the names out")
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    if tree.state.flags & re.IGNORECASE:
        raise ValueError(f"{pattern!r} ignores the case, which is not computed here: write the names out")
    return tree


class _Matcher:
    """One name; for each part of an expression and each place, where that part may end is found once."""

    def __init__(self, name: str, steps: Steps) -> None:
        self.name, self._steps = name, steps
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, items: Iterable[Any], start: int) -> frozenset[int]:
        """Where a sequence of items that begins at `start` may end."""
        key = (id(items), start)
        if key not in self._known:
            places = frozenset({start})
            for code, rest in items:
                if not places:
                    break
                self._steps.take(len(places))
                places = self._item(code, rest, places)
            self._known[key] = places
        return self._known[key]

    def _item(self, code: Any, rest: Any, starts: frozenset[int]) -> frozenset[int]:
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            return frozenset(i + 1 for i in starts if i < len(self.name) and _is_in(self.name[i], [(code, rest)]))
        if code is codes.BRANCH:
            return frozenset(end for choice in rest[1] for start in starts for end in self.ends(choice, start))
        if code is codes.SUBPATTERN and not (rest[1] | rest[2]) & re.IGNORECASE:
            return frozenset(end for start in starts for end in self.ends(rest[3], start))
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, items = rest
            return self._repeat(least, most, items, starts)
        if code is codes.AT and rest in _PLACES:
            return frozenset(i for i in starts if re.compile(_PLACES[rest]).match(self.name, i))
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            direction, items = rest
            return frozenset(i for i in starts if self._looks(direction, items, i) == (code is codes.ASSERT))
        raise ValueError(f"{code} in a regular expression is not computed here: write the names out")

    def _repeat(self, least: int, most: int, items: Any, starts: frozenset[int]) -> frozenset[int]:
        # A repetition beyond the name's length changes nothing: some of the earlier ones were empty.
        places, longest = starts, len(self.name) + 1
        for _ in range(min(least, longest)):
            self._steps.take(len(places))
            places = frozenset(end for place in places for end in self.ends(items, place))
        new = places
        for _ in range(min(most - least, longest)):
            self._steps.take(len(new))
            new = frozenset(end for place in new for end in self.ends(items, place)) - places
            if not new:
                break
            places = places | new
        return places

    def _looks(self, direction: int, items: Any, start: int) -> bool:
        if direction > 0:
            return bool(self.ends(items, start))
        width, _ = items.getwidth()
        return start >= width and start in self.ends(items, start - width)


def _is_in(letter: str, items: Iterable[tuple[Any, Any]]) -> bool:
    """Whether a letter is one of a class: [a-z_], \\d, or a letter."""
    for code, rest in items:
        if code is codes.NEGATE:
            return not _is_in(letter, [item for item in items if item[0] is not codes.NEGATE])
        if (
            (code is codes.LITERAL and ord(letter) == rest)
            or (code is codes.NOT_LITERAL and ord(letter) != rest)
            or (code is codes.ANY and letter != "\n")
            or (code is codes.RANGE and rest[0] <= ord(letter) <= rest[1])
            or (code is codes.CATEGORY and re.match(_CATEGORIES[rest], letter))
            or (code is codes.IN and _is_in(letter, rest))
        ):
            return True
    return False

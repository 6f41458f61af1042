"""Regular expressions of files, matched against names in time that no expression can blow up.

Python's own `re` tries one way after another, which takes 2 ** 40 steps for "(a+)+x" on a name of 40 letters. Here an
expression that `re` has parsed maps the set of places in the name where it may begin to the set where it may end. That
gives the same answer to "does all of it match?", for all that `re` has but back references, possessive and atomic
parts, conditions and flags.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 20_000  # characters of a pattern; each layer's name written out is half of it
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


def matches(pattern: str, name: str) -> bool:
    """Whether all of the name matches, as `re.fullmatch` says.

    Raises:
      ValueError: it is no regular expression, or has parts that are not computed here.
    """
    return len(name) in _Matcher(name).ends(_parsed(pattern), 0)


@functools.lru_cache(maxsize=64)
def _parsed(pattern: str) -> Any:
    if len(pattern) > _LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} characters is longer than {_LONGEST}: write the names out")
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    if tree.state.flags != re.UNICODE:
        raise ValueError(f"{pattern!r} has flags, which are not computed here: write the names out")
    return tree


class _Matcher:
    """One name; for each part of an expression and each place, where that part may end is found once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, items: Iterable[Any], start: int) -> frozenset[int]:
        """Where a sequence of items that begins at `start` may end."""
        key = (id(items), start)
        if key not in self._known:
            places = frozenset({start})
            for item in items:
                places = frozenset(end for place in places for end in self._item(item, place))
            self._known[key] = places
        return self._known[key]

    def _item(self, item: tuple[Any, Any], start: int) -> Iterable[int]:
        code, rest = item
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            return {start + 1} if start < len(self.name) and _is_in(self.name[start], [item]) else ()
        if code is codes.BRANCH:
            return {end for choice in rest[1] for end in self.ends(choice, start)}
        if code is codes.SUBPATTERN and rest[1:3] == (0, 0):
            return self.ends(rest[3], start)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, repeated = rest
            return self._repeat(least, most, lambda place: self.ends(repeated, place), start)
        if code is codes.AT and rest in _PLACES:
            return {start} if re.compile(_PLACES[rest]).match(self.name, start) else ()
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            found = self._looks(*rest, start)
            return {start} if found == (code is codes.ASSERT) else ()
        raise ValueError(f"{code} in a regular expression is not computed here: write the names out")

    def _repeat(self, least: int, most: int, once: Callable[[int], Iterable[int]], start: int) -> set[int]:
        # A repetition beyond the name's length changes nothing: some of the earlier ones were empty.
        places, least = {start}, min(least, len(self.name) + 1)
        for _ in range(least):
            places = {end for place in places for end in once(place)}
        new = places
        for _ in range(min(most, len(self.name) + 1 + least) - least):
            new = {end for place in new for end in once(place)} - places
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

"""Whose word each character is: texts in colours, and what Python's methods of text do to colours.

A palette gives each letter of the special tokens other code points, one for each colour: TEMPLATE is what the template
writes itself, ROLE a message's role; what people write has no colour. A coloured text is as long as the plain one, so
slices, joins and loops keep the colours by themselves. Methods that look at letters are run on the plain text here, and
the colours carried over. Where they cannot be, the letters get the colour LOST: nobody knows whose they are.
"""

import json
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from itertools import zip_longest
from types import GeneratorType
from typing import Any

from markupsafe import Markup

TEMPLATE, ROLE, LOST = range(3)
_DIRECTIVE = re.compile(  # of '%s' % x
    r"%(\((?P<key>[^()]*)\))?(?P<rest>(?P<flags>[-+ #0]*)(?P<width>\d*)(\.(?P<precision>\d*))?[hlL]?(?P<kind>.))", re.S
)
_FIELD = re.compile(r"\{\{|\}\}|\{(?P<name>\w*)\}|[{}]")  # of '{}'.format(x)
_ESCAPED = re.compile(r"\\U(00(?:0f|10)[0-9a-f]{4})")  # a letter with a colour, in `repr`
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}


class Key(str):
    """A coloured key of a dict, which is found by its plain text."""

    __slots__ = ("plain",)
    plain: str

    def __eq__(self, other: object) -> bool:
        return self.plain == (other.plain if isinstance(other, Key) else other)

    def __lt__(self, other: str) -> bool:
        return self.plain < (other.plain if isinstance(other, Key) else other)

    def __hash__(self) -> int:
        return hash(self.plain)


class Colours:
    """One palette: code points from `first` on, three for each of the letters."""

    def __init__(self, letters: str, first: int):
        self._first, self._count = first, len(letters)
        self._tables = [{ord(c): first + k * len(letters) + i for i, c in enumerate(letters)} for k in range(3)]
        self._plain = {new: old for table in self._tables for old, new in table.items()}
        self._coloured = re.compile(f"[{chr(first)}-{chr(first + 3 * len(letters) - 1)}]")
        self._escapes = {ord(c): entity for c, entity in _ENTITIES.items()}
        self._escapes |= {new: self._escapes[old] for new, old in self._plain.items() if old in self._escapes}

    def paint_variables(self, variables: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """What a template is given, in colours: the roles of messages, and what is not people's word.

        Args:
            own: {"names": variables that are the template's, "contents": [message, begin, end] of texts in contents}.
        """
        messages = [{**message, "role": self.paint(message["role"], ROLE)} for message in variables["messages"]]
        for index, begin, end in own["contents"]:
            text = messages[index]["content"]
            messages[index]["content"] = text[:begin] + self.paint(text[begin:end], TEMPLATE) + text[end:]
        named = {name: self.paint(variables[name], TEMPLATE) for name in own["names"]}
        return {**variables, **named, "messages": messages}

    def paint(self, text: str, colour: int) -> str:
        """The text in a colour; characters that are no letters of the palette stay."""
        return text.translate(self._tables[colour])

    def colour(self, character: str) -> int | None:
        """The colour of a character, None for what people write."""
        index = (ord(character) - self._first) // self._count
        return index if 0 <= index < 3 else None

    def is_coloured(self, value: Any) -> bool:
        """Whether a text, or one in lists and dicts, has colours."""
        if isinstance(value, str):
            return not value.isascii() and self._coloured.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.is_coloured, value)) or any(map(self.is_coloured, value.values()))
        return isinstance(value, list | tuple | KeysView | ValuesView | ItemsView) and any(map(self.is_coloured, value))

    def plain(self, value: Any) -> Any:
        """The text without colours; so are those in lists and dicts, of which it makes copies."""
        if isinstance(value, str):
            if value.isascii():
                return value
            text = value.translate(self._plain) if self._coloured.search(value) else value
            return Markup(text) if isinstance(value, Markup) else str(text)
        if isinstance(value, dict):
            return {self.plain(key): self.plain(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.plain, value))
        if isinstance(value, tuple):  # with names
            return type(value)(*map(self.plain, value))
        if isinstance(value, KeysView | ValuesView | ItemsView):
            return [self.plain(each) for each in value]
        return (self.plain(each) for each in value) if isinstance(value, GeneratorType) else value

    def key(self, value: Any) -> Any:
        """What a dict has as its key."""
        if not self.is_coloured(value) or not isinstance(value, str):
            return value
        key = Key(value)
        key.plain = str(self.plain(value))
        return key

    def checked(self, guess: Any, expected: Any) -> Any:
        """The coloured guess, if its plain text is what is expected; else that, with its letters LOST."""
        if guess is None:
            return self.lost(expected)
        if isinstance(expected, list | tuple):
            pairs = zip_longest(guess, expected)
            return type(expected)(self.checked(one, wanted) for one, wanted in list(pairs)[: len(expected)])
        if self.plain(guess) != expected:
            guess = self.lost(expected)
        return Markup(guess) if isinstance(expected, Markup) else str(guess)

    def lost(self, value: Any) -> Any:
        """The same with its letters LOST; so are those in lists and dicts."""
        if isinstance(value, str):
            text = self.paint(value, LOST)
            return Markup(text) if isinstance(value, Markup) else text
        if isinstance(value, dict):
            return {self.key(self.lost(key)): self.lost(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.lost, value))
        return type(value)(*map(self.lost, value)) if isinstance(value, tuple) else value  # with names

    def spell(self, value: Any) -> str:
        """As `str(value)`. The digits of numbers are LOST: they may be counted by the template, or be people's."""
        if isinstance(value, str):
            return value
        if isinstance(value, int | float):
            return self.paint(str(value), LOST)
        if not self.is_coloured(value):
            return str(value)
        shown = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), str(value))
        return str(self.checked(shown, str(self.plain(value))))

    def escape(self, value: Any) -> Markup:
        """As markupsafe's function."""
        if hasattr(value, "__html__"):
            return Markup(value)
        return Markup(self.spell(value).translate(self._escapes))

    def json(self, value: Any, ensure_ascii: bool, options: dict[str, Any]) -> str:
        """As `json.dumps`."""
        text = json.dumps(value, ensure_ascii=False, **options)
        if ensure_ascii:
            text = re.sub(
                r"[^\x00-\x7f\ufdd0-\ufdef]", lambda c: c[0] if self.is_coloured(c[0]) else json.dumps(c[0])[1:-1], text
            )
        spelled = {new: json.dumps(chr(old), ensure_ascii=ensure_ascii)[1:-1] for new, old in self._plain.items()}
        return text.translate({new: spelled[new] for new, old in self._plain.items() if spelled[new] != chr(old)})

    def method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method of the text gives."""
        if name == "join" and args:
            args = (list(args[0]), *args[1:])
        plain, plain_args, plain_kwargs = self.plain(text), self.plain(args), self.plain(kwargs)
        expected = getattr(plain, name)(*plain_args, **plain_kwargs)
        if not self.is_coloured([text, args, kwargs]) or not isinstance(expected, str | list | tuple):
            return expected
        if name in _CASES and isinstance(expected, str):
            return self.checked(self._with_case(text, name, expected), expected)
        if name in ("strip", "lstrip", "removeprefix"):
            kept = getattr(plain, "removeprefix" if name == "removeprefix" else "lstrip")(*plain_args)
            start = len(plain) - len(kept)
            return self.checked(str(text)[start : start + len(expected)], expected)
        if name in ("rstrip", "removesuffix"):
            return self.checked(str(text)[: len(expected)], expected)
        if name in ("split", "rsplit", "splitlines", "partition", "rpartition"):
            given = plain_kwargs.get("sep", plain_args[0] if plain_args else None) if name.endswith("split") else None
            return self.checked(_pieces(str(text), plain, expected, len(given or "")), expected)
        if name == "replace" and plain_args[0]:
            parts = _pieces(str(text), plain, str(plain).split(plain_args[0], *plain_args[2:]), len(plain_args[0]))
            return self.checked(str(args[1]).join(parts), expected)
        if name == "join":
            return self.checked(str(text).join(args[0]), expected)
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            return self.checked(getattr(str(text), name)(*args, **kwargs), expected)
        return self.checked(None, expected)

    def _with_case(self, text: str, name: str, result: str) -> str | None:
        """What a method that changes case made of the text, with its colours; None if it is not clear what became what.

        Some letters become two.
        """
        widths = [len(getattr(c, name)()) for c in self.plain(text)]
        if sum(widths) != len(result):
            return None
        coloured, at = [], 0
        for c, width in zip(text, widths, strict=True):
            colour, new = self.colour(c), result[at : at + width]
            coloured.append(new if colour is None else self.paint(new, colour))
            at += width
        return "".join(coloured)

    def percent(self, text: str, args: Any) -> Any:
        """As `text % args`. What a person's directive inserts is that person's word."""
        expected = self.plain(text) % self.plain(args)
        if not self.is_coloured([text, args]):
            return expected
        values = iter(args if isinstance(args, tuple) else (args,))

        def inserted(found: re.Match[str]) -> str:
            if found["kind"] == "%":
                return str(text[found.end() - 1])
            value = next(values) if found["key"] is None else args[found["key"]]
            if found["kind"] != "s":
                said = str(f"%{found['rest']}" % (self.plain(value),))
                return self.paint(said, LOST) if isinstance(value, int | float) else said
            said = str(self.spell(value))
            said = said if found["precision"] is None else said[: int(found["precision"] or 0)]
            width = int(found["width"] or 0)
            return said.ljust(width) if "-" in found["flags"] else said.rjust(width)

        return self.checked(self._filled(text, _DIRECTIVE, inserted), expected)

    def format(self, text: str, args: tuple[Any, ...], kwargs: Any, expected: str) -> Any:
        """What `text.format(*args, **kwargs)` gives, which is expected; LOST with others than {}, {0} and {name}."""
        if not self.is_coloured([text, args, kwargs]):
            return expected
        values = iter(args)

        def inserted(found: re.Match[str]) -> str:
            if found[0] in ("{{", "}}"):
                return str(text[found.start()])
            name = found["name"]
            if name is None:
                raise ValueError(f"{found[0]} opens another kind of field")
            value = next(values) if name == "" else args[int(name)] if name.isdigit() else kwargs[name]
            return str(self.spell(value))

        return self.checked(self._filled(text, _FIELD, inserted), expected)

    def _filled(self, text: str, pattern: re.Pattern[str], inserted: Callable[[re.Match[str]], str]) -> str | None:
        """The text with every place of the pattern filled; None if that fails."""
        parts, at = [], 0
        try:
            for found in pattern.finditer(self.plain(text)):
                new = inserted(found)
                is_own = self.colour(text[found.start()]) == TEMPLATE
                parts += [str(text)[at : found.start()], new if is_own else self.plain(new)]
                at = found.end()
        except (LookupError, TypeError, ValueError, StopIteration):
            return None
        return "".join([*parts, str(text)[at:]])


_CASES = frozenset(["upper", "lower", "casefold", "swapcase"])


def _pieces(text: str, plain: str, pieces: Iterable[str], gap: int) -> list[str]:
    """The pieces that the plain text was cut into, in colours; `gap` characters, or white space, are between them."""
    found, at = [], 0
    for piece in pieces:
        at = plain.find(piece, at)
        found.append(text[at : at + len(piece)])
        at += len(piece) + gap
    return found

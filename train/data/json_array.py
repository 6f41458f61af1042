"""The elements of a JSON array, or objects one after the other, read piece by piece: files may exceed the memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from phi3_jax.json_files import unique

LONGEST = 1 << 26  # bytes of a line or characters of an element; what is longer is no text to train on
_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(object_pairs_hook=unique)


def decode(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for an object that has a field twice, and RecursionError."""
    return _DECODER.decode(text)


def read_array(file: IO[bytes], is_inside: bool) -> Iterator[Any]:
    """The elements of an array whose "[" was just read; is_inside: it is a field of an object, whose other fields are
    scalars.

    Raises:
      ValueError: an element, or what stands after them, is not JSON. What comes after cannot be found then.
    """
    text, number = _Text(file), 0
    while text.next() != "]":
        number += 1
        if number > 1:
            text.expect(",", f"after entry {number - 1}")
        yield text.value(f"entry {number}")
    text.expect("]", "")
    while is_inside and text.next() == ",":
        text.expect(",", "")
        name = text.value("a field behind the array")
        text.expect(":", "behind the name of a field")
        text.value("a field behind the array")
        if name in ("system", "system_prompt", "tools", "functions"):
            raise ValueError(f"{name} stands beside the list in data; write it into each entry")
    if is_inside:
        text.expect("}", "behind the array")
    if text.next():
        raise ValueError("there is more behind the array; write one array, or one object on each line")


def read_objects(file: IO[bytes]) -> Iterator[Any]:
    """The values of a file that has nothing but white space between them. Raises ValueError as `read_array` does."""
    text, number = _Text(file), 0
    while text.next():
        number += 1
        yield text.value(f"entry {number}")


class _Text:
    """The characters of a file from here on; holds only those of the element that is read."""

    def __init__(self, file: IO[bytes]):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def expect(self, character: str, where: str) -> None:
        if (found := self.next()) != character:
            raise ValueError(f"not JSON: {found!r} instead of {character!r} {where}")
        self._at += 1

    def value(self, what: str) -> Any:
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                raise ValueError(f"{what} is nested too deeply") from None
            except ValueError as error:  # because of an error, or because the rest is not read yet
                if len(self._text) - self._at > LONGEST:
                    raise ValueError(f"{what} is longer than {LONGEST} characters; cut it into several") from None
                if self._ended:
                    raise ValueError(f"{what} is not JSON ({error}); entries behind it cannot be found") from None
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._more()

    def _more(self) -> None:
        """Reads as much again as there is, so that a long element is not tried too often."""
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0

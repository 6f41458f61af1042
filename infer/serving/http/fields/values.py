"""Reads the fields of a request strictly: each has a type and bounds, and an error names the field.

    bytes -> read_object -> Fields -> text, whole, number, ... -> refuse_others

A field that is null counts as one that is not there, as in OpenAI's API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from starlette.requests import Request

from phi3_jax.json_files import is_number, parse, shown

from ..errors import ApiError, invalid

T = TypeVar("T")

_AT_ONCE = 1 << 16  # bytes of JSON that are read in less than a millisecond
MOST_PARTS = 4096  # of a message's content
# What clients send along, and changes no answer.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)


async def read_fields(request: Request, any_type: bool = False) -> Fields:
    """The fields of a request's body.

    Args:
      any_type: what the body is called does not matter. Else only JSON is read, which pages of other sites cannot send
        without asking before.

    Raises:
      ApiError: 400 for what is no object in JSON, 415 for what says that it is something else.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not any_type:
        raise ApiError(415, f"the body is {given[:80] or 'of no type'}; send Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"the body is written in {encoding[:80]}; send it as it is")
    body = await request.body()
    return Fields(read_object(body) if len(body) <= _AT_ONCE else await asyncio.to_thread(read_object, body))


def read_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError for other JSON, and for none."""
    try:
        value = parse(body)
    except ValueError as error:
        raise invalid(f"the body cannot be read: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(f"the body is a {kind(value)}, not an object", code="invalid_json")
    return value


def kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def as_whole(value: Any) -> Any:
    """The value; a float that is a whole number becomes one, for JSON has one kind of number: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


class Fields:
    """The fields of one object. Its readers raise ApiError (400), with the name of the field, for wrong values."""

    def __init__(self, values: Any, place: str = ""):
        """Takes the object at `place`, such as "messages[0]"; raises ApiError if it is none."""
        if not isinstance(values, dict):
            raise invalid(f"{place} is a {kind(values)}, not an object", place, "invalid_type")
        self._values, self._place, self._unread = values, place, set(values)

    def name(self, key: str) -> str:
        """The whole name of a field, for errors."""
        return f"{self._place}.{key}" if self._place else key

    def get(self, key: str) -> Any:
        """Whatever is there; None if there is nothing."""
        self._unread.discard(key)
        return self._values.get(key)

    def wrong(self, key: str, wanted: str) -> ApiError:
        """The error for a value of another form."""
        name, value = self.name(key), self._values.get(key)
        return invalid(f"{name} must be {wanted}, not {shown(value)}", name, "invalid_type")

    def required(self, key: str) -> Any:
        """What is there. Raises ApiError if nothing is."""
        if (value := self.get(key)) is None:
            name = self.name(key)
            raise invalid(f"{name} is missing", name, "missing_required_parameter")
        return value

    def text(self, key: str, default: T, most: int | None = None) -> str | T:
        """A text of at most so many characters."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        if most is not None and len(value) > most:
            name = self.name(key)
            raise invalid(f"{name} has {len(value)} characters, more than {most}", name)
        return value

    def whole(self, key: str, default: T, least: int, most: int) -> int | T:
        """A whole number in [least, most]."""
        value = self.get(key)
        if value is None:
            return default
        value = as_whole(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "a whole number")
        if not least <= value <= most:
            name = self.name(key)
            raise invalid(f"{name}={shown(value)} must be at least {least} and at most {most}", name)
        return value

    def number(self, key: str, default: T, least: float, most: float) -> float | T:
        """A number in [least, most]."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, "a number")
        if not least <= value <= most:
            name = self.name(key)
            raise invalid(f"{name}={shown(value)} must be at least {least:g} and at most {most:g}", name)
        if not is_number(value):  # top_p=5e-324 would be 0 on the device, where no token is left then
            raise self.wrong(key, "a number that float32 holds")
        return float(value)

    def truth(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, options: Collection[str], default: T) -> str | T:
        """One of several texts."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in options:
            raise self.wrong(key, " or ".join(f'"{option}"' for option in options))
        return value

    def items(self, key: str, most: int) -> list[Any] | None:
        """A list of at most so many values."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        if len(value) > most:
            name = self.name(key)
            raise invalid(f"{name} has {len(value)} entries, more than {most}", name)
        return value

    def parts(self, key: str) -> list[Fields] | None:
        """The objects of a list; None for what is no list."""
        value = self.get(key)
        if not isinstance(value, list):
            return None
        return [
            Fields(each, f"{self.name(key)}[{index}]") for index, each in enumerate(self.items(key, MOST_PARTS) or [])
        ]

    def inner(self, key: str) -> Fields | None:
        """The fields of an object in this one."""
        value = self.get(key)
        return None if value is None else Fields(value, self.name(key))

    def only(self, key: str, *values: Any) -> None:
        """A field that is known, but may have only these values. Raises ApiError for others."""
        value = self.get(key)
        # In Python 0 is False.
        is_known = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)
        if value is not None and not is_known:
            name = self.name(key)
            raise invalid(f"{name}={shown(value)} is not supported; leave it out", name, "unsupported_value")

    def refuse_others(self, ignored: Collection[str] = ()) -> None:
        """Raises ApiError if there is a field that nobody has read: it could be a typing error."""
        unknown = (key for key in self._unread.difference(ignored) if self._values[key] is not None)
        if (first := min(unknown, default=None)) is not None:
            name = self.name(first[:80])
            raise invalid(f"there is no field {shown(name)}", name, "unknown_parameter")


def attempt(make: Callable[[], T], param: str | None) -> T:
    """What `make` gives; its ValueError becomes an error of this field."""
    try:
        return make()
    except ValueError as error:
        raise invalid(str(error), param) from None

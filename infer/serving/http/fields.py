"""Reads the fields of a request strictly: each has a type and bounds, and an error names the field.

    bytes -> read_object -> Fields -> text, whole, number, ... -> refuse_others

A field that is null counts as one that is not there, as in OpenAI's API.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from starlette.requests import Request

from phi3_jax.json_files import parse, shown

from ...sampling import Sampling
from .errors import ApiError, invalid

T = TypeVar("T")

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 300
LONGEST_SCHEMA = 1 << 18  # characters of a schema, or of all tools together
MOST_SCHEMA_DEPTH = 64
_AT_ONCE = 1 << 16  # bytes of JSON that are read in less than a millisecond
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
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # JSON has one kind of number: 1.0 is 1
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

    def inner(self, key: str) -> Fields | None:
        """The fields of an object in this one."""
        value = self.get(key)
        return None if value is None else Fields(value, self.name(key))

    def only(self, key: str, *values: Any) -> None:
        """A field that is known, but may have only these values. Raises ApiError for others."""
        value = self.get(key)
        if value is not None and value not in values:
            name = self.name(key)
            raise invalid(f"{name}={shown(value)} is not supported; leave it out", name, "unsupported_value")

    def refuse_others(self, ignored: Collection[str] = ()) -> None:
        """Raises ApiError if there is a field that nobody has read: it could be a typing error."""
        unknown = sorted(key for key in self._unread.difference(ignored) if self._values[key] is not None)
        if unknown:
            name = self.name(unknown[0][:80])
            raise invalid(f"there is no field {shown(name)}", name, "unknown_parameter")


def read_sampling(fields: Fields, default: Sampling) -> Sampling:
    """How tokens are picked; what a request leaves open is as in `default`, and its seed is drawn."""
    own: dict[str, Any] = {
        "temperature": fields.number("temperature", None, 0, 2),
        "top_p": fields.number("top_p", None, 0, 1),
        "top_k": fields.whole("top_k", None, -1, 2**31 - 1),
        "min_p": fields.number("min_p", None, 0, 1),
        "typical_p": fields.number("typical_p", None, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", None, 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", None, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", None, -2, 2),
        "min_new_tokens": fields.whole("min_tokens", None, 0, 2**31 - 1),
        "logit_bias": _read_logit_bias(fields),
    }
    changes = {name: value for name, value in own.items() if value is not None}
    if changes.get("top_k") in (-1, 0):  # as clients of other servers say that there is no such limit
        changes["top_k"] = None
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    changes["seed"] = secrets.randbits(32) if seed is None else seed % 2**32
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        name = str(error).partition("=")[0]
        raise invalid(str(error), name if name in own else None) from None


def with_seed(sampling: Sampling, index: int) -> Sampling:
    """The settings of the index-th of several answers to one prompt."""
    return dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)


def _read_logit_bias(fields: Fields) -> dict[int, float] | None:
    value = fields.get("logit_bias")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fields.wrong("logit_bias", 'an object such as {"123": -5}')
    if len(value) > MOST_BIASES:
        raise invalid(f"logit_bias has {len(value)} entries, more than {MOST_BIASES}", "logit_bias")
    bias = {}
    for key, number in value.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not re.fullmatch("0|[1-9][0-9]{0,8}", key) or not is_number or not -100 <= number <= 100:
            raise invalid(
                f"logit_bias has {shown({key[:40]: number})}; it takes ids in quotes, and numbers in [-100, 100]",
                "logit_bias",
            )
        bias[int(key)] = float(number)
    return bias


def read_stop(fields: Fields) -> tuple[str, ...]:
    """The strings that end an answer."""
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.wrong("stop", "a text, or a list of texts that are not empty")
    if len(stops) > MOST_STOPS:
        raise invalid(f"stop has {len(stops)} entries, more than {MOST_STOPS}", "stop")
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise invalid(f"stop has a text of more than {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def read_most_tokens(fields: Fields, most: int, default: T) -> int | T:
    """max_completion_tokens, or max_tokens as it was called before."""
    found = {
        value
        for name in ("max_tokens", "max_completion_tokens")
        if (value := fields.whole(name, None, 0, 2**31 - 1)) is not None
    }
    if len(found) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    return min(found.pop(), most) if found else default


def check_schema(schema: Any, name: str) -> None:
    """Raises ApiError for a JSON schema that is too large or too deep to be turned into a grammar."""
    if not isinstance(schema, dict):
        raise invalid(f"{name} is a {kind(schema)}, not an object", name, "invalid_type")
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise invalid(f"{name} has more than {LONGEST_SCHEMA} characters; make it smaller", name)
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in parts for each in part if isinstance(each, dict | list)]
    if level:
        raise invalid(f"{name} is nested more than {MOST_SCHEMA_DEPTH} times; make it flatter", name)


def attempt(make: Callable[[], T], param: str | None) -> T:
    """What `make` gives; its ValueError becomes an error of this field."""
    try:
        return make()
    except ValueError as error:
        raise invalid(str(error), param) from None

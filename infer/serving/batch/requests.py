"""The requests of a batch in our own form: a file of JSON lines, each read strictly."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from phi3_jax.text import read_chat, read_tools

from ...sampling import Sampling
from .json_lines import LineFile, check_id, open_file, parse_object, shown


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the input.

    Attributes:
      line: its number in the file, from 1 on.
      fields: the line as it was read; they are copied into the output.
      prompt: the text to continue, or None.
      messages: the conversation to answer, or None. Exactly one of the two is given.
      tools: the functions that the answer may call, or None.
      max_new_tokens: the line's own, or None.
      sampling: the program's, changed by the line's own values.
    """

    line: int
    fields: dict[str, Any]
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[Any] | None
    max_new_tokens: int | None
    sampling: Sampling
    keys: ClassVar[frozenset[str]]  # of all requests, which answers cannot have

    @property
    def kept(self) -> Mapping[str, Any]:
        """The fields that its answer repeats."""
        return self.fields

    @property
    def identity(self) -> list[Any]:
        """All that its answer depends on."""
        return [self.fields, self.max_new_tokens, repr(self.sampling)]


def read_requests(source: str | os.PathLike[str] | LineFile, sampling: Sampling) -> list[Request]:
    """The requests of a file in UTF-8 with one JSON object per line; blank lines are ignored.

    An object has either "prompt", a text, or "messages", a list of {"role": text, "content": text} as `encode_chat`
    takes it; and it may have "tools" (functions that the answer may call), "id" (text or a number; comes back in the
    output), "max_new_tokens" and every field of `Sampling`, where null is None and the keys of "logit_bias" are ids in
    quotes. Other keys are refused: one could be a typing error.

    Args:
      sampling: the values that a line does not give itself. Its seed + i is the seed of request i, counted from 0.

    Raises:
      FileNotFoundError: no such file.
      ValueError: there are no requests, or some lines cannot be used; names up to ten of these with the reasons.
    """
    file = source if isinstance(source, LineFile) else open_file(source)
    first_with_id: dict[Any, int] = {}

    def read(line: int, raw: bytes, index: int) -> Request:
        request = read_request(line, raw, index, sampling)
        if "id" in request.fields:
            check_id(first_with_id, "id", request.fields["id"], line)
        return request

    advice = f'a line holds "prompt" or "messages"; it may also hold {", ".join(sorted(_OPTIONAL))}'
    return file.read(read, advice)


def read_request(line: int, raw: bytes, index: int, sampling: Sampling) -> Request:
    """The request in a line, see `read_requests`. Raises ValueError."""
    fields = parse_object(raw)
    if unknown := sorted(fields.keys() - FORMS.keys()):
        raise ValueError(f"unknown keys {[key[:40] for key in unknown[:10]]}")
    if len(fields.keys() & {"prompt", "messages"}) != 1:
        raise ValueError('exactly one of "prompt" and "messages" has to be there')
    for key, value in fields.items():
        if value is None and key in ("tools", "max_new_tokens"):  # as if it were not there
            continue
        is_good, wanted = FORMS[key]
        if not is_good(value):
            raise ValueError(f"{key}={shown(value)} must be {wanted}")
    own = {"seed": (sampling.seed + index) % 2**32} | {key: fields[key] for key in fields.keys() & _SAMPLING.keys()}
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
    optional = {key: fields.get(key) for key in ("prompt", "messages", "tools", "max_new_tokens")}
    return Request(line, fields, **optional, sampling=dataclasses.replace(sampling, **own))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int in Python, but never meant as one


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_whole(value) and abs(value) <= 2**53)  # exact as floats


def _is_bias(value: Any) -> bool:
    # int() alone would also take "1_0" and " 1"; and with leading zeros two keys could be one token.
    keys_are_ids = isinstance(value, dict) and all(re.fullmatch("0|[1-9][0-9]{0,9}", key) for key in value)
    return keys_are_ids and all(map(_is_number, value.values()))


def _is_readable(read: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """A check that says itself what is wrong."""

    def check(value: Any) -> bool:
        read(value)
        return True

    return check


# Whether a value has the right form, and that form in words. `Sampling` checks the ranges of numbers.
_Form = tuple[Callable[[Any], bool], str]
_BY_TYPE: dict[Any, _Form] = {
    int: (_is_whole, "a whole number"),
    float: (_is_number, "a number"),
    int | None: (lambda x: x is None or _is_whole(x), "a whole number or null"),
    float | None: (lambda x: x is None or _is_number(x), "a number or null"),
    Sequence[int]: (lambda x: isinstance(x, list) and all(map(_is_whole, x)), "a list of token ids"),
    Mapping[int, float]: (_is_bias, 'an object such as {"123": 1.5}, from token ids to numbers'),
}
# A field of Sampling with a type that is not above fails here, on import, and not silently later.
_SAMPLING: dict[str, _Form] = {name: _BY_TYPE[kind] for name, kind in typing.get_type_hints(Sampling).items()}
_OPTIONAL: dict[str, _Form] = {
    "id": (lambda x: isinstance(x, str | float) or _is_whole(x), "a text or a number"),
    "tools": (_is_readable(read_tools), ""),
    "max_new_tokens": (lambda x: _is_whole(x) and x >= 1, "a whole number of at least 1"),
    **_SAMPLING,
}
FORMS: dict[str, _Form] = {
    "prompt": (lambda x: isinstance(x, str) and x != "", "a text that is not empty"),
    "messages": (_is_readable(read_chat), ""),
    **_OPTIONAL,
}
Request.keys = frozenset(FORMS)

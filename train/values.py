"""The values of single settings: their types and ranges, and how --set spells them."""

from __future__ import annotations

import itertools
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from phi3_jax.adapters import HEAD, TABLE, TARGETS
from phi3_jax.quantization import parse_format
from phi3_jax.spelling import did_you_mean

_INT32, _FLOAT32 = np.iinfo(np.int32), np.finfo(np.float32)
_UNIONS = (typing.Union, types.UnionType)  # such as int | Literal["auto"]
_NAMES = {bool: "True or False", str: "a text", int: "a whole number", float: "a number"}


class Range(NamedTuple):
    """The numbers from `least` to `most`; with `above` and `below` without these two themselves."""

    least: float = 0
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        number = value if isinstance(value, int) else _in_float32(value)
        high_enough = number > self.least if self.above else number >= self.least
        return high_enough and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'at least'} {self.least}"
        return least if self.most == math.inf else f"{least} and {'below' if self.below else 'at most'} {self.most}"


_POSITIVE, _UP_TO_1, _BELOW_1 = Range(0, above=True), Range(0, 1), Range(0, 1, below=True)
MOST_ROWS = 1 << 16  # at a time, and of a step
_COUNTS = ("lora_rank", "keep_last", "max_bad_steps")
# Numbers that are not here are at least 0.
_RANGES = {
    **dict.fromkeys((*_COUNTS, "log_every", "eval_every", "save_every"), Range(1)),
    **dict.fromkeys(("lr", "epsilon", "dpo_beta", "lora_alpha"), _POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "label_smoothing", "lora_dropout", "eval_fraction"), _BELOW_1),
    **dict.fromkeys(("final_lr", "z_loss"), _UP_TO_1),
    "mixture": Range(0.001, 1000),
    **dict.fromkeys(("batch_size", "accumulation"), Range(1, MOST_ROWS)),
    "sequence_length": Range(2),  # the first token of a row is not learned
}
_ELEMENTS = {"lora_targets": (*TARGETS, TABLE, HEAD), "trackers": ("csv", "wandb", "mlflow")}
_NEEDED = ("checkpoint", "output", "lora_targets", "dpo_reference")  # may not be empty
_POLICIES = ("int8", "int4", "int4-mixed", "stored")


def check(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError if the setting of this name and type cannot have this value."""
    if typing.get_origin(hint) in _UNIONS:
        hint = _of_union(value, typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        _check_word(name, value, typing.get_args(hint))
    elif isinstance(hint, types.GenericAlias):
        _check_tuple(name, value, typing.get_args(hint)[0])
    elif hint in (int, float):
        _check_number(name, value, hint)
    elif type(value) is not hint:
        raise ValueError(f"{name}={_shown(value)}: must be {_NAMES[hint]}, not {_type(value)}")
    if name in _NEEDED and not (value.strip() if isinstance(value, str) else value):
        raise ValueError(f"{name}: must not be empty")
    if name == "quantize" and value not in ("", *_POLICIES):
        try:
            parse_format(value)
        except ValueError as error:
            raise ValueError(f"quantize={value}: {error}{did_you_mean(value, _POLICIES)}") from None


def _of_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Which of the kinds a value of this type may be of; the first one, if none. Several sets of words are one."""
    if all(typing.get_origin(kind) is Literal for kind in kinds):
        return Literal[*itertools.chain(*map(typing.get_args, kinds))]

    def is_one(kind: Any) -> bool:
        return isinstance(value, str if typing.get_origin(kind) is Literal else typing.get_origin(kind) or kind)

    return next(filter(is_one, kinds), kinds[0])


def _check_word(name: str, value: Any, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"{name}={_shown(value)}: must be one of {', '.join(words)}{hint}")


def _check_tuple(name: str, value: Any, kind: type) -> None:
    if type(value) is not tuple:
        element = "1.0" if kind is float else "'a'"
        raise ValueError(f"{name}={_shown(value)}: must be a tuple, such as ({element},), not {_type(value)}")
    for each in value:
        check(name, each, kind)
        if (known := _ELEMENTS.get(name)) is not None and each not in known:
            raise ValueError(f"{name}: there is no {each!r}, only {', '.join(known)}{did_you_mean(each, known)}")
    if name in _ELEMENTS and len(set(value)) < len(value):
        raise ValueError(f"{name}={_shown(value)}: names one of them twice")


def _check_number(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"{name}={_shown(value)}: must be {_NAMES[kind]}, not {_type(value)}")
    allowed = _RANGES.get(name, Range())
    most = _INT32.max if kind is int else float(_FLOAT32.max)
    if value not in allowed or (value == 0 and math.copysign(1, value) < 0):  # NaN is in no range
        is_rounded = isinstance(value, float) and _in_float32(value) in (0, 1) and value not in (0, 1)
        rounded = " in float32" if is_rounded else ""
        raise ValueError(f"{name}={_shown(value)}: must be {allowed}{rounded}")
    if value > most:
        raise ValueError(f"{name}={_shown(value)}: must be at most {most if kind is int else f'{most:.3g}'}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not spell integers of thousands of digits
        text = "a number of thousands of digits"
    return cut(text)


def cut(text: str) -> str:
    """A text for an error's message."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def _type(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _in_float32(value: float) -> float:
    """What a step computes with: 0.99999999 is 1 there, and 1e-50 is 0."""
    with np.errstate(over="ignore", under="ignore"):
        number = float(np.float32(value))
    return 0.0 if abs(number) < _FLOAT32.tiny else number


def parse(name: str, text: str, hint: Any) -> Any:
    """The value that a text such as "1e-4" or "qkv_proj,o_proj" stands for. Raises ValueError if it stands for none."""
    if hint == str | tuple[str, ...]:
        names = _split(text)
        return names[0] if len(names) == 1 else names
    if typing.get_origin(hint) in _UNIONS:
        kinds = typing.get_args(hint)
        words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
        if text in words:
            return text
        try:
            return parse(name, text, kinds[0])
        except ValueError as error:
            raise ValueError(f"{error}, or {' or '.join(words)}{did_you_mean(text, words)}") from None
    if isinstance(hint, types.GenericAlias):
        parts = text.split(",") if text else []
        return tuple(parse(name, part.strip(), typing.get_args(hint)[0]) for part in parts)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={cut(text)}: must be true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{name}={cut(text)}: must be {_NAMES[hint]}") from None
    return text


def spell(value: Any) -> str:
    """A value as `parse` takes it: "true", "qkv_proj,o_proj"."""
    if isinstance(value, tuple | list):
        return ",".join(map(spell, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _split(text: str) -> tuple[str, ...]:
    """Names with commas between; one that has commas itself is known by the file of that name."""
    pieces, names = text.split(",") if text else [], []
    while pieces:
        longest = [n for n in range(len(pieces), 1, -1) if Path(",".join(pieces[:n])).exists()]
        count = longest[0] if longest else 1
        names.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return tuple(names)

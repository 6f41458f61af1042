"""How a request wants its answers to be written: how tokens are picked, and where an answer ends."""

from __future__ import annotations

import dataclasses
import re
import secrets
from typing import Any, TypeVar

from phi3_jax.json_files import shown

from ....sampling import Sampling
from ..errors import invalid
from .values import Fields

T = TypeVar("T")

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 300


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


def read_most_tokens(fields: Fields, most: int, default: T, least: int = 1) -> int | T:
    """max_completion_tokens, or max_tokens as it was called before."""
    found = {
        value
        for name in ("max_tokens", "max_completion_tokens")
        if (value := fields.whole(name, None, least, 2**31 - 1)) is not None
    }
    if len(found) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    return min(found.pop(), most) if found else default

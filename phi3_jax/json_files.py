"""JSON files of other programs and people, read strictly: settings, vocabularies, conversations, schemas.

Python's own reader takes the last of two values of one key, NaN, half of a surrogate pair, and numbers of any length;
and it raises RecursionError. Here all of these are one ValueError that names the file, and so is a file that is too
large, in another encoding, or none at all, such as a pipe. Values are checked where they are used, with `is_whole`,
`is_number` and `shown`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from phi3_jax.regular_file import require_regular

# Bytes that are read of a file; what is larger is none of its kind.
SETTINGS = 16 << 20  # settings, indexes, schemas, tools
VOCABULARY = 64 << 20  # tokenizer.json; the largest published ones have 33 MB
CHAT = 64 << 20  # a conversation

LARGEST, SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38  # of float32, the smallest that is not denormal
MOST_IDS = 1 << 22  # ids of a vocabulary; the largest published ones have 262,144
_DEEPEST = 128  # lists and objects inside of one another
_MOST_PARTS = 1_000_000  # lists and objects
_ENCODINGS = ("utf-8", "utf-8-sig")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a half of a surrogate pair, perhaps alone
_REMEDY = "download the file again"


def is_whole(value: Any, least: int = 0, most: int = 2**31 - 1) -> bool:
    """Whether it is a whole number within these bounds, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, neither as infinity nor as 0 unless it is 0; and no truth value."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and (value == 0 or SMALLEST <= abs(value) <= LARGEST)


def shown(value: Any) -> str:
    """A value for an error's text, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_object(path: Path, most: int = SETTINGS, remedy: str = _REMEDY, wide: bool = False) -> dict[str, Any]:
    """The object in a file. Arguments and errors as in `read_value`."""
    value = read_value(path, most, remedy, wide)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; {remedy}")
    return value


def read_value(path: Path, most: int = SETTINGS, remedy: str = _REMEDY, wide: bool = False) -> Any:
    """The value in a file.

    Args:
      most: the bytes that are read.
      remedy: the end of an error's text.
      wide: as in `parse`.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no regular file, too large, or no strict JSON in UTF-8.
    """
    data = read_bytes(path, most)
    try:
        return parse(data, wide)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from None


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises OSError, and ValueError for what is no regular file, or larger than `most`."""
    require_regular(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: larger than {most} bytes, which no such file needs; is it another kind of file?")
    return data


def parse(data: str | bytes, wide: bool = False) -> Any:
    """The value of a JSON text, in UTF-8 with or without a byte-order mark.

    Args:
      wide: whole numbers beyond 64 bits are read as floats, as by most programs, and not refused. Tokenizers of
        transformers say "model_max_length": 1000000000000000019884624838656.

    Raises:
      ValueError: it is none, or says one thing twice, or holds what cannot be computed with. Names no file.
    """
    text = decode(data) if isinstance(data, bytes) else data
    if text.count("{") + text.count("[") > _MOST_PARTS:
        raise ValueError(f"more than {_MOST_PARTS} lists and objects")
    try:
        value = (_WIDE if wide else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if _HALF.search(text):
        try:  # "\ud800" is JSON, but cannot be tokenised, nor written as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair") from None
    return value


def decode(data: bytes) -> str:
    """The text of bytes in UTF-8, without a byte-order mark. Raises ValueError for another encoding."""
    if (found := json.detect_encoding(data)) not in _ENCODINGS:
        raise ValueError(f"written in {found[:6].upper()}; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs. Raises ValueError if a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()  # to count each name among all would take hours where there are many
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {shown(name)} is there twice")
            seen.add(name)
    return found


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):  # 1e999, as well as NaN and Infinity
        raise ValueError(f"{number[:40]} is not a finite number")
    return value


def _whole(digits: str) -> int:
    # Python itself refuses more than 4300 digits.
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"the number {digits[:20]}... of {len(digits)} characters does not fit into 64 bits")
    return value


def _wide(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else _float_or_whole(digits)


def _float_or_whole(digits: str) -> int | float:
    try:
        return _whole(digits)
    except ValueError:
        return _finite(digits)


def _decoder(parse_int: Any) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=unique, parse_float=_finite, parse_constant=_finite, parse_int=parse_int
    )  # fmt: skip


_STRICT, _WIDE = _decoder(_whole), _decoder(_wide)


def _check_depth(value: Any) -> None:
    """So that whatever walks through the value later need not fear for Python's stack."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for part in inside for each in part if isinstance(each, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"nested too deeply, in more than {_DEEPEST} lists and objects")

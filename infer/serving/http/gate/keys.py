"""API keys: who may use the server. They come from a file or the environment, never from the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from phi3_jax.regular_file import read_text

VARIABLE = "PHI3_API_KEYS"
_SHORTEST = 16  # characters: what is shorter can be guessed


class Keys:
    """Some keys. Only their digests are kept, so that none can end up in a log or in a traceback."""

    def __init__(self, keys: Iterable[str]):
        """Takes the keys. Raises ValueError for one that is too short or cannot be a header, without showing it."""
        found = list(keys)
        for number, key in enumerate(found, start=1):
            if len(key) < _SHORTEST or not re.fullmatch(r"[!-~]+", key):
                raise ValueError(
                    f"API key {number} must have at least {_SHORTEST} letters, digits and signs of ASCII; make one by "
                    "openssl rand -hex 24"
                )
        self._digests = [_digest(key) for key in found]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def number_of(self, key: str) -> int | None:
        """Which key it is, counted from 1; None if it is none. Takes the same time for every key."""
        given, number = _digest(key), None
        for index, digest in enumerate(self._digests, start=1):
            if hmac.compare_digest(given, digest):
                number = index
        return number


def read_keys(path: str | None) -> Keys:
    """The keys of a file, one a line, `#` before comments, and of the environment, with white space or commas between.

    Raises OSError and ValueError, with the name of the file or the variable: also if one is there and holds no key, for
    whoever made it does not want a server without keys.
    """
    lines = [] if path is None else read_text(Path(path)).splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if path is not None and not keys:
        raise ValueError(f"{path}: holds no API key; write one a line")
    more = [key for key in re.split(r"[\s,]+", os.environ.get(VARIABLE, "")) if key]
    if VARIABLE in os.environ and not more:
        raise ValueError(f"{VARIABLE} is set, but holds no API key: put one there, or unset it")
    try:
        return Keys([*keys, *more])
    except ValueError as error:
        places = [place for place, found in ((path, keys), (VARIABLE, more)) if found]
        raise ValueError(f"{' and '.join(map(str, places))}: {error}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
      keys: without any, everyone who reaches it.
      hosts: the names, beside those of this machine, that requests may call it by; None: whatever they say.
      origins: pages of these sites may use it, too.
    """

    keys: Keys = dataclasses.field(default_factory=lambda: Keys([]))
    hosts: Collection[str] | None = ()
    origins: Collection[str] = ()

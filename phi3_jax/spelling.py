"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], sign: str = "") -> str:
    """The end of an error's text, such as "; did you mean lora_rank?" for "lora_rnk"; empty if no name is near.

    Args:
      sign: stands before the name, as -- before a flag.
    """
    by_letters = {name.lower().replace("-", "_"): name for name in known}
    plain = word.strip().lower().replace("-", "_")
    near = difflib.get_close_matches(plain, by_letters, n=1, cutoff=0.6)
    return f"; did you mean {sign}{by_letters[near[0]]}?" if near else ""

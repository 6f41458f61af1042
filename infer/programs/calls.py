"""How the programs show the functions that an answer calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from phi3_jax.text import ToolCall


def print_calls(calls: Sequence[ToolCall], problems: Sequence[str], program: str) -> None:
    """A line of JSON for each call to standard output; what is no call to standard error."""
    for call in calls:
        print(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False), flush=True)
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr, flush=True)

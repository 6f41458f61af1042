"""Changes to a JSON document: a node becomes a value that nobody expects."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# As they are written, because not all of them are Python's.
NASTY = (
    *("0", "-1", "1", "2", "-0.0", "1.5", "255", "256", "65536", str(2**31 - 1), str(2**31), str(2**32), str(2**63)),
    *(str(-(2**63) - 1), str(2**64), "1" + "0" * 400, "1" + "0" * 5000, "-1" + "0" * 400, "1000000000", "8000000000"),
    *("1e39", "-1e39", "1e-46", "1e308", "1e999", "-1e999", "1e-400", "NaN", "Infinity", "-Infinity", "0.1", "3.0"),
    *(
        "null",
        "true",
        "false",
        '""',
        '" "',
        '"a"',
        '"0"',
        '"1"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"../x"',
    ),
    *('"/etc/passwd"', '"' + "a" * 70_000 + '"', '"\\n"', '"auto"', '"<|end|>"', '"{{ messages }}"', '"NaN"', '"%s%n"'),
    *("[]", "{}", "[[]]", "[null]", "[0]", '["a"]', "[1, 2, 3]", '{"a": 1}', '{"": null}', "[" + "0, " * 5000 + "0]"),
    *("[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[true, 1, null, {}]", '[["a", "a"]]'),
)
_MARK = "\u2603 this is replaced \u2603"
Path = tuple[str | int, ...]


def paths(tree: Any, most: int = 20_000) -> list[Path]:
    """The places of all nodes, the root's first."""
    found: list[Path] = [()]
    stack: list[tuple[Path, Any]] = [((), tree)]
    while stack and len(found) < most:
        path, node = stack.pop()
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            found.append((*path, key))
            stack.append(((*path, key), child))
    return found


def pick(tree: Any, rng: random.Random) -> Path:
    """A node's place; each depth is as likely as the others, so that long lists do not crowd out what is short."""
    everything = paths(tree)
    depth = rng.choice(sorted({len(path) for path in everything}))
    return rng.choice([path for path in everything if len(path) == depth])


def change(tree: Any, rng: random.Random) -> tuple[str, str, Path]:
    """Another document -> (its text, the kind of change, the place)."""
    tree, path = copy.deepcopy(tree), pick(tree, rng)
    if not path:
        return rng.choice(NASTY), "nasty root", path
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    kind = rng.choice(("nasty", "nasty", "nasty", "near", "drop", "copy", "key", "twice"))
    raw = rng.choice(NASTY)
    if kind == "near":
        raw = json.dumps(_near(value, rng))
    elif kind == "drop":
        del parent[key]
        return json.dumps(tree), kind, path
    elif kind == "copy":  # another node of the document
        other: Any = tree
        for step in pick(tree, rng):
            other = other[step]
        raw = json.dumps(other)
    elif kind == "key" and isinstance(parent, dict):
        del parent[key]
        name = rng.choice(
            ("", "a", str(key) + "s", str(key).upper(), "\ud800", str(key) + "\0", "__metadata__", "type")
        )
        parent[name] = value
        return json.dumps(tree), kind, path
    elif kind == "twice" and isinstance(parent, dict):
        parent[_MARK] = 0
        pair = f"{json.dumps(key)}: {rng.choice((raw, json.dumps(value)))}"
        return json.dumps(tree).replace(f"{json.dumps(_MARK)}: 0", pair), kind, path
    parent[key] = _MARK
    return json.dumps(tree).replace(json.dumps(_MARK), raw), kind, path


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same type, or of one that is easily taken for it."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value), [value]))
    if isinstance(value, float):
        return rng.choice((-value, value * 2, value / 2, int(value), str(value), 1 / value if value else 1.0))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value[::-1], [value], {value: value}, f" {value}"))
    if isinstance(value, list):
        return rng.choice((value[:-1], value * 2, value[::-1], dict.fromkeys(map(str, value)), value[:1], [value]))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), {}, [value], dict(list(value.items())[:-1])))
    return rng.choice((0, "", [], {}, False))

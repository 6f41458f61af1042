"""Changes to the header of a safetensors file that keep it readable as JSON: sizes, offsets, shapes, types, names."""

from __future__ import annotations

import json
import random
from typing import Any

from . import json_trees

SIZES = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    63,
    64,
    255,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
    10**30,
)
# Types of the same size are left out: no reader could tell them apart.
_TYPES = {
    "F32": ("F16", "F64", "U8", "I8", "X", ""),
    "BF16": ("F32", "U8", "F64", "bf16"),
    "F16": ("F32", "U8", "F8_E5M2"),
}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of the tensors of a valid file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def data_start(content: bytes) -> int:
    """The first byte of the tensors."""
    return 8 + int.from_bytes(content[:8], "little")


def join(header: str, data: bytes) -> bytes:
    """A file with this header."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def change(content: bytes, rng: random.Random) -> tuple[bytes, str, str]:
    """Changes a field -> (the file, kind, detail)."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    kind = rng.choice(
        ("offset", "offset", "both offsets", "shape", "dtype", "length", "overlap", "gap", "name", "tree")
    )
    detail = name
    if kind == "offset":
        i, old = rng.randrange(2), list(entry["data_offsets"])
        entry["data_offsets"][i] = _other(old[i], rng)
        detail = f"{name}: {old} -> {entry['data_offsets']}"
    elif kind == "both offsets":
        step = rng.choice((-64, -8, -4, -2, 2, 4, 8, 64, entry["data_offsets"][0] or 4))
        entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]
        detail = f"{name}: by {step}"
    elif kind == "overlap":  # the same bytes as another tensor, of the same size if there is one
        begin, end = entry["data_offsets"]
        others = [header[o]["data_offsets"] for o in names if o != name]
        alike = [o for o in others if o[1] - o[0] == end - begin]
        entry["data_offsets"] = rng.choice(alike or others or [[begin, end + 4]])
    elif kind == "gap":  # bytes that belong to no tensor, before one and all behind it
        at, size = entry["data_offsets"][0], rng.choice((1, 2, 8, 64))
        for other in names:
            header[other]["data_offsets"] = [o + size * (o > at or o == header[other]["data_offsets"][0] == at)
                                             for o in header[other]["data_offsets"]]  # fmt: skip
        header[name]["data_offsets"] = [at + size, header[name]["data_offsets"][1]]
        data = data[:at] + rng.randbytes(size) + data[at:]
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice((
            [], shape[:-1], [*shape, 1], [1, *shape], [_other(n, rng) for n in shape], [-n for n in shape],
            [*shape[:-1], _other(shape[-1], rng)], [1 << 32, 1 << 32, *shape], [0, *shape], [float(n) for n in shape],
        ))  # fmt: skip
        detail = f"{name}: {shape} -> {entry['shape']}"
    elif kind == "dtype":
        entry["dtype"] = rng.choice(_TYPES.get(entry["dtype"], ("F32", "I64", "")))
    elif kind == "length":
        changed = bytearray(content)
        changed[:8] = (_other(int.from_bytes(content[:8], "little"), rng) % (1 << 64)).to_bytes(8, "little")
        return bytes(changed), kind, ""
    elif kind == "name":
        header[rng.choice((name + "x", name.upper(), "", "../" + name, "\ud800", rng.choice(names)))] = header.pop(name)
    else:
        text, kind, path = json_trees.change(header, rng)
        return join(text, data), f"tree, {kind}", repr(path)[:200]
    return join(json.dumps(header), data), kind, detail


def _other(number: int, rng: random.Random) -> int:
    near = number + rng.choice((-64, -32, -8, -4, -2, -1, 1, 2, 4, 8, 32, 64))
    return rng.choice((near, near, near, -number, number * 2, number // 2, rng.choice(SIZES)))

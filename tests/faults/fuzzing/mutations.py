"""One change to a valid input, chosen by a seed: the same reader and seed always make the same one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from . import any_bytes, file_kinds, gguf_headers, json_trees, safetensors_headers, template_pieces
from .reader import Mutation, Reader


def variant_of(reader: Reader, seed: int) -> int:
    """Which of the reader's inputs a seed changes."""
    return seed % reader.variants


def mutate(folder: Path, name: str, reader: Reader, seed: int) -> Mutation:
    """Changes a file in the folder."""
    rng = random.Random(f"{name} {seed}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _weight(path, folder, reader))
    path = rng.choices(files, [_weight(path, folder, reader) for path in files])[0]
    file = str(path.relative_to(folder))
    if rng.random() < 0.06 and reader.is_file:
        kind, place = file_kinds.change(path, rng, reader.is_bounded)
        return Mutation(file, place, kind, "")
    content = path.read_bytes()
    change = {
        ".json": _json, ".safetensors": _safetensors, ".gguf": _gguf, ".jinja": _template, ".jsonl": _lines,
        ".partial": _lines, ".txt": _text,
    }.get(path.suffix, _bytes)  # fmt: skip
    changed, place, kind, detail = change(content, rng)
    if place == "settings" and _is_strict(reader, file, detail.split(" ")[0]):
        place = "header"
    path.write_bytes(changed)
    return Mutation(file, place, kind, detail[:200])


def _is_strict(reader: Reader, file: str, key: str) -> bool:
    """Whether a file describes a layout, or its outermost `key` does."""
    whole = [pattern for pattern in reader.strict if ":" not in pattern]
    return any(Path(file).match(pattern) for pattern in whole) or f"{file}:{key}" in reader.strict


def _weight(path: Path, folder: Path, reader: Reader) -> float:
    return next((weight for pattern, weight in reader.files.items() if path.relative_to(folder).match(pattern)), 0.0)


_Change = tuple[bytes, str, str, str]  # the file, place, kind, detail


def _bytes(content: bytes, rng: random.Random) -> _Change:
    changed = any_bytes.change(content, rng)
    return (
        changed.content,
        "header" if changed.resized else "data",
        changed.kind,
        f"byte {changed.at} of {len(content)}",
    )


def _text(content: bytes, rng: random.Random) -> _Change:
    if rng.random() < 0.15:
        return _encoded(content, rng)
    changed, _, kind, detail = _bytes(content, rng)
    return changed, "settings", kind, detail


def _encoded(content: bytes, rng: random.Random) -> _Change:
    changed, kind = file_kinds.encode(content, rng)
    return changed, "settings", f"encoding, {kind}", ""


def _json(content: bytes, rng: random.Random) -> _Change:
    """`detail` begins with the outermost key."""
    if rng.random() < 0.25:
        return _text(content, rng)
    text, kind, path = json_trees.change(json.loads(content), rng)
    return text.encode("utf-8", "surrogatepass"), "settings", kind, f"{path[0] if path else '-'} {path}"


def _lines(content: bytes, rng: random.Random) -> _Change:
    """One line of JSON lines, or some of them."""
    lines = content.split(b"\n")
    if rng.random() < 0.3 or len(lines) < 2:
        return _text(content, rng)
    at, how = rng.randrange(len(lines) - 1), rng.random()
    if how < 0.1:
        lines.insert(rng.randrange(len(lines)), lines[at])
        return b"\n".join(lines), "settings", "line twice", f"line {at + 1}"
    if how < 0.2:
        del lines[at]
        return b"\n".join(lines), "settings", "line away", f"line {at + 1}"
    lines[at], place, kind, detail = _json(lines[at], rng)
    return b"\n".join(lines), place, kind, f"line {at + 1}: {detail}"


def _safetensors(content: bytes, rng: random.Random) -> _Change:
    if rng.random() < 0.5:
        changed, kind, detail = safetensors_headers.change(content, rng)
        place = "settings" if "__metadata__" in detail else "header"
        return changed, place, kind, detail
    start = safetensors_headers.data_start(content)
    within = (0, start) if rng.random() < 0.4 else (start, len(content))
    found = any_bytes.change(content, rng, within)
    place = "header" if found.resized or found.at < start else "data"
    if found.at < start and not found.resized and _same_but_metadata(content, found.content):
        place = "settings"
    return found.content, place, found.kind, f"byte {found.at}, data from {start} to {len(content)}"


def _same_but_metadata(old: bytes, new: bytes) -> bool:
    try:
        headers = [safetensors_headers.split(each)[0] for each in (old, new)]
    except (ValueError, RecursionError):
        return False
    for header in headers:
        if not isinstance(header, dict):
            return False
        header.pop("__metadata__", None)
    return headers[0] == headers[1]


def _gguf(content: bytes, rng: random.Random) -> _Change:
    if rng.random() < 0.6:
        changed, field, how = gguf_headers.change(content, rng)
        place = "data" if gguf_headers.is_alike(field, content, changed) else field.place
        return changed, place, f"{field.kind}, {how}", f"{field.of} at byte {field.begin}"
    start = gguf_headers.data_start(content)
    found = any_bytes.change(content, rng, rng.choice(((0, start), (start, len(content)))))
    detail = f"byte {found.at}, data from {start} to {len(content)}"
    if found.at >= start:
        return found.content, "header" if found.resized else "data", found.kind, detail
    touched = [each for each in gguf_headers.fields(content) if each.begin <= found.at < each.end]
    # A change of one byte in a value is another value; more bytes may reach anything.
    one = not found.resized and sum(a != b for a, b in zip(content, found.content, strict=True)) == 1
    free = one and all(f.place == "settings" or gguf_headers.is_alike(f, content, found.content) for f in touched)
    place = "settings" if free else "header"
    return found.content, place, found.kind, f"{detail} ({', '.join(f'{f.kind} of {f.of}' for f in touched)})"


def _template(content: bytes, rng: random.Random) -> _Change:
    if rng.random() < 0.4:
        return _text(content, rng)
    text, kind = template_pieces.change(content.decode(), rng)
    return text.encode("utf-8", "surrogatepass"), "settings", kind, ""

"""What a tokenizer's JSON files may hold: looked at as they are read, before anything is built of it.

Each check raises ValueError with the file, the key and what is wrong. Keys that are not read here may hold anything.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.json_files import MOST_IDS, is_whole, read_object, shown

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
LONGEST = 1024  # characters of an added token, which is looked for in every text; the longest known ones have 100
_REMEDY = "download the file again."


def check_settings(config: Mapping[str, Any], path: Path) -> None:
    """tokenizer_config.json or special_tokens_map.json."""
    for key in NAMES:
        if config.get(key) is not None:
            _check_token(config[key], key, path)
    if config.get("add_bos_token") not in (None, False, True):
        raise _wrong(path, "add_bos_token", config["add_bos_token"], "true or false")
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key)
        if extra is not None and not isinstance(extra, list | dict):
            raise _wrong(path, key, extra, "a list of strings")
        for name, token in _items(extra or []):
            _check_token(token, f"{key}[{name!r}]", path)
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise _wrong(path, "added_tokens_decoder", listed, "an object of entries by their ids")
    for token_id, entry in listed.items():
        where = f"added_tokens_decoder[{shown(token_id)}]"
        if not re.fullmatch("0|[1-9][0-9]{0,8}", token_id) or not is_whole(int(token_id), 0, MOST_IDS - 1):
            raise ValueError(f"{path}: {where}: the key must be an id below {MOST_IDS}; {_REMEDY}")
        check_entry(entry, where, path)


def check_entry(entry: Any, where: str, path: Path) -> None:
    """An added token with its flags."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise _wrong(path, where, entry, 'an object with a string "content"')
    _check_length(entry["content"], where, path)
    for flag in _FLAGS:
        if not isinstance(entry.get(flag, False), bool):
            raise _wrong(path, f"{where}.{flag}", entry[flag], "true or false")


def check_ids(ids: Any, where: str, path: Path) -> None:
    """A vocabulary: strings with their ids."""
    if not isinstance(ids, dict):
        raise _wrong(path, where, ids, "an object of strings with their ids")
    if odd := [piece for piece, token_id in ids.items() if not is_whole(token_id, 0, MOST_IDS - 1)]:
        raise _wrong(path, f"{where}[{shown(odd[0])}]", ids[odd[0]], f"an id from 0 to below {MOST_IDS}")
    if len(set(ids.values())) < len(ids):
        first: dict[int, str] = {}
        one, other = next((first[i], piece) for piece, i in ids.items() if first.setdefault(i, piece) != piece)
        raise ValueError(
            f"{path}: {where}: the strings {shown(one)} and {shown(other)} have one id, {ids[one]}; {_REMEDY}"
        )


def check_document(spec: Mapping[str, Any], path: Path) -> None:
    """tokenizer.json, as far as it is read here; the rest is for the tokenizers library."""
    model, inside = spec.get("model"), spec.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: no BPE model in it; convert the tokenizer to BPE or use tokenizer.model.")
    check_ids(model.get("vocab"), "model.vocab", path)
    for at, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)):
            raise _wrong(path, f"model.merges[{at}]", merge, "two strings")
    if not isinstance(inside, list):
        raise _wrong(path, "added_tokens", inside, "a list")
    for at, entry in enumerate(inside):
        check_entry(entry, f"added_tokens[{at}]", path)
        if not is_whole(entry.get("id"), 0, MOST_IDS - 1):
            raise _wrong(path, f"added_tokens[{at}].id", entry.get("id"), f"an id from 0 to below {MOST_IDS}")


def rows_of(path: Path) -> int | None:
    """The `vocab_size` of a config.json; None if there is no file, or it does not say."""
    rows = read_object(path, wide=True).get("vocab_size") if path.exists() else None
    if rows is not None and not is_whole(rows, 1, MOST_IDS):
        raise _wrong(path, "vocab_size", rows, f"a whole number from 1 to {MOST_IDS}")
    return rows


def _check_token(value: Any, where: str, path: Path) -> None:
    if isinstance(value, dict):
        check_entry(value, where, path)
    elif not isinstance(value, str):
        raise ValueError(f"{path}: {where} is {shown(value)}; make it a string.")
    else:
        _check_length(value, where, path)


def _check_length(content: str, where: str, path: Path) -> None:
    if len(content) > LONGEST:
        raise ValueError(f"{path}: {where} has {len(content)} characters, and at most {LONGEST} make sense; {_REMEDY}")


def _items(values: Any) -> Iterator[tuple[Any, Any]]:
    yield from values.items() if isinstance(values, dict) else enumerate(values)


def _wrong(path: Path, where: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{path}: {where} is {shown(value)}, and must be {wanted}; {_REMEDY}")

"""The settings beside a vocabulary: added tokens and their flags, bos and eos, the chat template; all cross-checked."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.text.backends import AddedToken


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file; ValueError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; download the file again.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json fills gaps in the older layout without `added_tokens_decoder`."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return {**read_json(folder / "special_tokens_map.json"), **config}


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja if there is one, else the config's template (of several, the one named "default")."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f'{folder}: chat templates {sorted(named)} but none named "default"; rename one of them.')
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template is a {type(template).__name__}; make it a string.")
    return template


def named_token(config: Mapping[str, Any], name: str) -> str | None:
    """A token that the config names, as a plain string or as an object with "content"."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"tokenizer_config.json: {name} is {value!r}; make it a string.")
    return value


def listed_in_config(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of `added_tokens_decoder`, by the tokens' strings."""
    entries = config.get("added_tokens_decoder", {})
    return {entry["content"]: {**entry, "id": int(token_id)} for token_id, entry in entries.items()}


def make_added_tokens(
    listed: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], source: Path
) -> tuple[AddedToken, ...]:
    """Added tokens by id. Those that the config names (bos, eos, ...) are special whatever their entry says."""
    named = {named_token(config, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    for extra in config.get("additional_special_tokens") or []:
        named.add(extra["content"] if isinstance(extra, dict) else extra)
    tokens = [
        AddedToken(
            id=entry["id"],
            content=content,
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            single_word=bool(entry.get("single_word", False)),
            special=bool(entry.get("special", False)) or content in named,
        )
        for content, entry in listed.items()
    ]
    if "" in listed:
        raise ValueError(f"{source}: an added token is the empty string; remove it from the tokenizer's files.")
    return tuple(sorted(tokens, key=lambda token: token.id))


def join_vocabulary(vocabulary: Mapping[int, str], added: Iterable[AddedToken], source: Path) -> tuple[str | None, ...]:
    """The strings of all ids, None for unused ids; as many as `vocab_size` in config.json beside the file, if any.

    Raises:
        ValueError: two strings claim one id, one string has two ids, or an id lies outside of the embedding.
    """
    joined = dict(vocabulary)
    ids = {piece: token_id for token_id, piece in vocabulary.items()}
    for token in added:
        if joined.setdefault(token.id, token.content) != token.content:
            raise ValueError(
                f"{source}: added token {token.content!r} has id {token.id}, which is {joined[token.id]!r}; "
                "correct added_tokens_decoder in tokenizer_config.json."
            )
        if ids.setdefault(token.content, token.id) != token.id:
            raise ValueError(
                f"{source}: added token {token.content!r} has two ids, {ids[token.content]} and {token.id}; "
                "correct added_tokens_decoder in tokenizer_config.json."
            )
    rows = read_json(source.with_name("config.json")).get("vocab_size", max(joined, default=-1) + 1)
    outside = {token_id: piece for token_id, piece in joined.items() if not 0 <= token_id < rows}
    if outside:
        raise ValueError(
            f"{source}: tokens {dict(sorted(outside.items())[:5])} lie outside of the vocabulary of {rows} ids; "
            "use the tokenizer and the config.json of one checkpoint."
        )
    return tuple(joined.get(token_id) for token_id in range(rows))


def id_of(token: str | None, pieces: tuple[str | None, ...], source: Path) -> int | None:
    """The id of a named token, None for None; ValueError if the vocabulary lacks it."""
    if token is None:
        return None
    if token not in pieces:
        raise ValueError(
            f"{source}: {token!r}, named in tokenizer_config.json, is not in the vocabulary; add or rename it."
        )
    return pieces.index(token)


def opening_token(post_processor: Any) -> str | None:
    """The token that a tokenizer.json's post-processor puts in front of a text, None if it puts none."""
    if not isinstance(post_processor, dict):
        return None
    if post_processor.get("type") == "Sequence":
        return next(filter(None, map(opening_token, post_processor["processors"])), None)
    single = post_processor.get("single") or [{}]
    opening: str | None = single[0].get("SpecialToken", {}).get("id")
    return opening

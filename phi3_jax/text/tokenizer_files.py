"""The settings beside a vocabulary: added tokens and their flags, bos and eos, chat templates; all cross-checked.

Where two files say different things, the one that transformers reads is read, with a warning that names both.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from phi3_jax.json_files import SETTINGS, VOCABULARY, decode, is_whole, read_bytes, read_object, shown
from phi3_jax.text.added_tokens import AddedToken, is_hidden, is_special, template_text
from phi3_jax.text.tokenizer_checks import NAMES, check_document, check_ids, check_settings, rows_of

_AGAIN = "download the file again."


def read_document(path: Path) -> dict[str, Any]:
    """The contents of a tokenizer.json. Raises ValueError, also for any other model than BPE."""
    spec = read_object(path, VOCABULARY, wide=True)
    check_document(spec, path)
    return spec


def read_added_tokens(folder: Path) -> dict[str, int]:
    """The ids in added_tokens.json, the older layout; {} if there is no file."""
    path = folder / "added_tokens.json"
    ids = read_object(path, wide=True) if path.exists() else {}
    check_ids(ids, "the object", path)
    return ids


def warn_of(text: str) -> None:
    """A warning about a checkpoint's files."""
    warnings.warn(text, UserWarning, stacklevel=2)


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json overrides it in the older layout without `added_tokens_decoder`.

    Warns:
        UserWarning: the two name another bos or eos.
    """
    paths = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, older = (read_object(path, wide=True) if path.exists() else {} for path in paths)
    for path, settings in zip(paths, (config, older), strict=True):
        check_settings(settings, path)
    used, other = (config, older) if "added_tokens_decoder" in config else (older, config)
    name = "tokenizer_config.json" if used is config else "special_tokens_map.json"
    for key in ("bos_token", "eos_token"):
        first, second = named_token(used, key), named_token(other, key)
        if None not in (first, second) and first != second:
            warn_of(
                f"{folder}: {key} is {first!r} in {name}, which is used, as in transformers, but {second!r} in the "
                "other of tokenizer_config.json and special_tokens_map.json; correct the wrong one."
            )
    return config if used is config else {**config, **older}


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, of which "default" is the usual one.

    chat_template.jinja and additional_chat_templates/*.jinja, or else what the config holds.

    Raises:
        ValueError: the config's template is not a text, nor a list of named ones, or two have one name.

    Warns:
        UserWarning: both are there and the usual one differs, or none is named "default".
    """
    inside = config.get("chat_template")
    if isinstance(inside, list):
        inside = _listed_templates(inside, folder)
    elif not isinstance(inside, dict):
        inside = {} if inside is None else {"default": inside}
    if odd := [name for name, template in inside.items() if not isinstance(template, str)]:
        kind = type(inside[odd[0]]).__name__
        raise ValueError(f"{folder}: the chat_template {odd[0]!r} is a {kind}; make it a string.")
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files = {name: _read_template(path) for name, path in paths.items() if path.exists()}
    known = files or inside
    if files and "default" in inside and inside["default"].strip() != files.get("default", "").strip():
        warn_of(
            f"{folder}: {paths[next(iter(files))].relative_to(folder)} is read, as in transformers, and the other "
            "chat_template in tokenizer_config.json is not; remove one of them."
        )
    if known and "default" not in known:
        warn_of(f'{folder}: chat templates {sorted(known)} but none named "default"; rename one of them.')
    return known


def _listed_templates(listed: list[Any], folder: Path) -> dict[str, Any]:
    """Of [{"name": ..., "template": ...}, ...], by their names."""
    found: dict[str, Any] = {}
    for at, entry in enumerate(listed):
        where = f"{folder / 'tokenizer_config.json'}: chat_template[{at}]"
        if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
            raise ValueError(f'{where} is {shown(entry)}; make it {{"name": ..., "template": ...}}.')
        if not isinstance(name := entry["name"], str):
            raise ValueError(f"{where}: the name {shown(name)} is a {type(name).__name__}; make it a string.")
        if name in found:
            raise ValueError(f"{where}: there is another template named {shown(name)}; remove or rename one of them.")
        found[name] = entry["template"]
    return found


def _read_template(path: Path) -> str:
    data = read_bytes(path, SETTINGS)
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}); download the file again.") from None


def named_token(config: Mapping[str, Any], name: str) -> str | None:
    """A token that the config names, as a plain string or as an object with "content"."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"tokenizer_config.json: {name} is {shown(value)}; make it a string.")
    return value


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that the config gives them, as transformers hands them to chat templates."""
    extra = config.get("extra_special_tokens")
    entries = {key: value for key, value in config.items() if key in NAMES} | (extra if isinstance(extra, dict) else {})
    return {name: token for name in entries if (token := named_token(entries, name))}


def _named_entries(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Special tokens that a config names (bos, eos, a model's own, extra ones), by their strings, as entries."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    own = [key for key in config if key.endswith("_token") and key not in NAMES and not key.startswith("add_")]
    values = [config.get(key) for key in (*NAMES, *own)]
    values += extra.values() if isinstance(extra, dict) else extra
    entries = [value if isinstance(value, dict) else {"content": value} for value in values]
    named = [entry for entry in entries if isinstance(entry.get("content"), str)]
    return {str(entry["content"]): {**entry, "special": True} for entry in named}


def listed_in_config(config: Mapping[str, Any], older: Mapping[str, int]) -> list[dict[str, Any]]:
    """The entries of `added_tokens_decoder` by their ids; without it those of added_tokens.json, the older layout."""
    if "added_tokens_decoder" in config:
        entries = [{**entry, "id": int(token_id)} for token_id, entry in config["added_tokens_decoder"].items()]
    else:
        named = _named_entries(config)
        entries = [{"id": token_id, "content": c, "special": c in named} for c, token_id in older.items()]
    entries = [{"normalized": not entry.get("special", False), **entry} for entry in entries]
    return sorted(entries, key=lambda entry: entry["id"])


def make_added_tokens(
    listed: Iterable[Mapping[str, Any]],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    chat_template: str | None,
    source: Path,
    *,
    normalizer: Any = None,
    normalize: Callable[[str], str] = str,
    keep_ids: bool = False,
) -> tuple[AddedToken, ...]:
    """Added tokens by id, with the ids and flags that transformers gives them.

    A string of the vocabulary keeps its id, and a new one gets the next free id; of several entries for one string the
    last has the flags. What the config names (bos, eos, ...) is added and special whatever its entry says.

    Args:
        listed: entries with "id", "content" and flags, in the order in which they are added.
        vocabulary: the ids of the vocabulary's strings.
        normalizer, normalize: of a tokenizer.json, and what it makes of a text.
        keep_ids: a new string gets its entry's id instead, as without a tokenizer.json.

    Warns:
        UserWarning: a token does not get the id that its file says, or is named but not in the vocabulary.
    """
    table: dict[str, dict[str, Any]] = {}
    named = _named_entries(config)
    highest = -1

    def add(entry: Mapping[str, Any]) -> None:
        nonlocal highest
        content = entry["content"]
        if content == "":
            raise ValueError(f"{source}: an added token is the empty string; remove it from the tokenizer's files.")
        old = table.get(content, {})
        new_id = entry["id"] if keep_ids and "id" in entry else max(highest + 1, len(vocabulary))
        token_id = old.get("id", vocabulary.get(content, new_id))
        if (wanted := entry.get("id", token_id)) != token_id:
            warn_of(
                f"{source}: the added token {content!r} has the id {token_id}, as in transformers, not {wanted} as its "
                "entry says; correct the entry, or the vocabulary."
            )
        if "id" not in entry and not old and content not in vocabulary and content != named_token(config, "pad_token"):
            warn_of(
                f"{source}: {content!r}, named in tokenizer_config.json, is not in the vocabulary and gets the new id "
                f"{token_id}, as in transformers; add or rename it."
            )
        # The tokenizers library forgets neither that a token was special, nor how it was spelled when normalised.
        normalized = bool(entry.get("normalized", False))
        table[content] = {
            **entry,
            "id": token_id,
            "special": bool(entry.get("special", False)) or old.get("special", False) or content in named,
            "normalized": normalized,
            "spelled": normalized or old.get("spelled", False),
        }
        highest = max(highest, token_id)

    for entry in listed:
        add(entry)
    for content, entry in named.items():
        if content not in table:
            add(entry)
    template = template_text(chat_template)
    tokens = [_added_token(entry, template, normalizer, normalize) for entry in table.values()]
    return tuple(sorted(tokens, key=lambda token: token.id))


def _added_token(
    entry: Mapping[str, Any], template: str, normalizer: Any, normalize: Callable[[str], str]
) -> AddedToken:
    content = entry["content"]
    hidden = is_hidden(content, entry["special"])
    special = is_special(content, hidden, template)
    # Where other text than its own could become a special token, it is looked for in the text as it is written.
    normalized = entry["normalized"] and not (special and _rewrites(normalizer, content))
    return AddedToken(
        id=entry["id"],
        content=content,
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        single_word=bool(entry.get("single_word", False)),
        special=special,
        hidden=hidden,
        normalized=normalize(content) if normalized else None,
        spelling=normalize(content) if entry["spelled"] else None,
    )


def warn_of_other_ids(older: Mapping[str, int], ids: Mapping[str, int], source: Path) -> None:
    """Warns where added_tokens.json gives other ids than the files that are used."""
    if odd := {content: token_id for content, token_id in older.items() if ids.get(content) != token_id}:
        warn_of(
            f"{source}: the ids {dict(list(odd.items())[:5])} in added_tokens.json are not those of the other files, "
            "which are used, as in transformers; remove the wrong file."
        )


def join_vocabulary(
    vocabulary: Mapping[int, str], added: Sequence[AddedToken], config: Mapping[str, Any], source: Path
) -> tuple[str | None, ...]:
    """The strings of all ids, None for unused ids; `vocab_size` of them, as config.json beside the file says, or more.

    Raises:
        ValueError: two strings claim one id, or the vocabulary has more strings than the embedding rows.

    Warns:
        UserWarning: added tokens, other than the one for padding, lie beyond the embedding.
    """
    joined = dict(vocabulary)
    for token in added:
        if joined.setdefault(token.id, token.content) != token.content:
            raise ValueError(
                f"{source}: added token {token.content!r} has id {token.id}, which is {joined[token.id]!r}; "
                "correct added_tokens_decoder in tokenizer_config.json."
            )
    end = max(joined, default=-1) + 1
    rows = end if (said := rows_of(source.with_name("config.json"))) is None else said
    if outside := {token_id: piece for token_id, piece in vocabulary.items() if not 0 <= token_id < rows}:
        raise ValueError(
            f"{source}: tokens {dict(sorted(outside.items())[:5])} lie outside of the vocabulary of {rows} ids; "
            "use the tokenizer and the config.json of one checkpoint."
        )
    padding = {named_token(config, "pad_token"), "[PAD]", "<pad>", "<|pad|>"}
    if beyond := {token.id: token.content for token in added if token.id >= rows and token.content not in padding}:
        warn_of(
            f"{source}: the model cannot read the added tokens {dict(list(beyond.items())[:5])}: config.json's "
            f"vocab_size is {rows}; remove them, or enlarge the embedding."
        )
    return tuple(joined.get(token_id) for token_id in range(max(rows, end)))


def id_of(token: str | None, pieces: tuple[str | None, ...]) -> int | None:
    """The id of a named token, None for None."""
    return None if token is None else pieces.index(token)


def frame_of(post_processor: Any, pieces: tuple[str | None, ...], source: Path) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json's post-processor puts in front of a text, and behind it.

    Raises:
        ValueError: it does anything else, or names what is no token.
    """
    frame = _frame_of(post_processor, pieces, source)
    if wrong := [token_id for token_id in chain(*frame) if not is_whole(token_id, 0, len(pieces) - 1)]:
        raise ValueError(
            f"{source}: post_processor has the id {shown(wrong[0])}, outside of the vocabulary of {len(pieces)} ids; "
            f"{_AGAIN}"
        )
    return frame


def _frame_of(post_processor: Any, pieces: tuple[str | None, ...], source: Path) -> tuple[list[int], list[int]]:
    kind = post_processor.get("type") if isinstance(post_processor, dict) else None
    if kind in (None, "ByteLevel"):
        return [], []
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [post_processor["cls"][1]], [post_processor["sep"][1]]
    if kind == "Sequence":
        frames = [_frame_of(each, pieces, source) for each in post_processor["processors"]]
        found = [frame for frame in frames if frame != ([], [])]
        if len(found) <= 1:
            return found[0] if found else ([], [])
    if kind == "TemplateProcessing":
        single, known = post_processor["single"], post_processor.get("special_tokens", {})
        names = [item["SpecialToken"]["id"] if "SpecialToken" in item else None for item in single]
        if names.count(None) == 1:
            if absent := [n for n in names if n is not None and n not in known and n not in pieces]:
                raise ValueError(f"{source}: post_processor names {shown(absent[0])}, which is no token; {_AGAIN}")
            ids = [known[n]["ids"] if n in known else [pieces.index(n)] for n in names if n is not None]
            at = names.index(None)
            return list(chain(*ids[:at])), list(chain(*ids[at:]))
    raise ValueError(
        f"{source}: unsupported post_processor {json.dumps(post_processor)[:200]}; use one that puts tokens in front "
        "of a text or behind it."
    )


def _rewrites(normalizer: Any, content: str) -> bool:
    """Whether a tokenizer.json's normaliser could make this string of another one, not only by spaces."""
    if not isinstance(normalizer, dict):
        return False
    kind = normalizer["type"]
    if kind == "Sequence":
        return any(_rewrites(each, content) for each in normalizer["normalizers"])
    if kind == "NFC":  # makes ASCII of U+212A, U+037E and U+1FEF only
        return not content.isascii() or not {"K", ";", "`"}.isdisjoint(content)
    spaces = kind == "Replace" and re.fullmatch(r"\s", normalizer["pattern"].get("String", ""))
    return kind != "Prepend" and not spaces

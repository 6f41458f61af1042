"""The tokenizer inside a GGUF file: its `tokenizer.*` metadata, converted to the contents of a tokenizer.json."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.json_files import shown
from phi3_jax.text import Tokenizer
from phi3_jax.text.added_tokens import END_NAMES, AddedToken, is_hidden, is_special, template_text
from phi3_jax.text.backends import SPACE_MARK, TokenizersEncoder, decoder_for

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_ENDS = ("bos", "eos", "eot", "eom")
_NAMED = (*_ENDS, "unknown", "padding")  # ids that have a key of their own

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    """Steps that split words by this regular expression, which matches a word, instead of GPT-2's."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTE_LEVEL, "use_regex": False}]


_ENGLISH_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _split(
    rf"{_ENGLISH_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_O200K = _split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclasses.dataclass(frozen=True)
class _Pre:
    """What `tokenizer.ggml.pre` stands for: how words are split, and settings that llama.cpp takes from the name."""

    steps: list[dict[str, Any]]
    add_bos: bool = False
    ignore_merges: bool = False  # a word that is a token as a whole needs no merges


PRE_TOKENIZERS = {
    "gpt-2": _Pre([_BYTE_LEVEL]),
    "smollm": _Pre([_DIGITS, _BYTE_LEVEL]),
    "dbrx": _Pre(_CL100K),  # Phi-4
    "llama-bpe": _Pre(_CL100K, add_bos=True, ignore_merges=True),
    "gpt-4o": _Pre(_O200K),  # Phi-4-mini
}

_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "phi-2": "gpt-2"}  # llama.cpp's


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer that GGUF metadata describes.

    Args:
        metadata: the file's keys with plain Python values.
        path: the file, for messages.

    Raises:
        ValueError: metadata missing, of unequal lengths, contradictory, or of an unknown kind.
    """
    kind = _need(metadata, "tokenizer.ggml.model", path)
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"{path}: tokenizer.ggml.model is {shown(kind)}; known are 'gpt2' and 'llama'.")
    tokens, types = _vocabulary(metadata, path)
    added = _added_tokens(metadata, kind, tokens, types)
    spec, add_bos = (_llama_spec if kind == "llama" else _gpt2_spec)(metadata, tokens, types, path)
    bos_id = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens), path)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    if add_bos and bos_id is None:
        raise ValueError(f"{path}: bos is to be added but there is no tokenizer.ggml.bos_token_id; set the key.")
    eos_id = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens), path)
    closes = metadata.get("tokenizer.ggml.add_eos_token", False)
    return Tokenizer(
        encoder=TokenizersEncoder(spec, added, path),
        new_decoder=decoder_for(spec["decoder"], path),
        pieces=tuple(None if t == UNUSED else token for token, t in zip(tokens, types, strict=True)),
        added_tokens=added,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=add_bos,
        chat_template=metadata.get("tokenizer.chat_template"),
        source=path,
        document=spec,
        tool_chat_template=metadata.get("tokenizer.chat_template.tool_use"),
        closing=(eos_id,) if closes and eos_id is not None else (),
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a GGUF tokenizer as tokenizer.json and tokenizer_config.json, which give the same ids in transformers.

    Raises:
        ValueError: the tokenizer was read from files of its own, which should be copied instead.
    """
    if tokenizer.document is None:
        raise ValueError(
            f"{tokenizer.source}: only GGUF tokenizers are written anew; set Checkpoint.folder to copy it."
        )
    # What is special but not hidden is so by its name, which is read again.
    added = [dataclasses.asdict(token) | {"special": token.hidden} for token in tokenizer.added_tokens]
    for entry in added:
        del entry["hidden"], entry["spelling"]
        entry["normalized"] = False  # GGUF knows no other
    opening, closing = [tokenizer.bos_token] * tokenizer.add_bos, [tokenizer.eos_token] * len(tokenizer.closing)
    ids = {tokenizer.bos_token: tokenizer.bos_id, tokenizer.eos_token: tokenizer.eos_id}
    before, behind = ([{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (opening, closing))
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    processor = {
        "type": "TemplateProcessing",
        "single": [*before, texts[0], *behind],
        "pair": [*before, *texts, *behind],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in opening + closing},
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": processor if before or behind else None,
        **tokenizer.document,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.tool_chat_template is not None:
        templates = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_chat_template}
        settings["chat_template"] = [{"name": name, "template": t} for name, t in templates.items() if t is not None]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    given = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def _need(metadata: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{path}: the key {key} is missing; convert the model to GGUF again.")
    return metadata[key]


def _column(metadata: Mapping[str, Any], name: str, rows: int, absent: Any, path: str) -> list[Any]:
    """A value for each token; where the file has none, `absent`, as in llama.cpp."""
    column = list(metadata.get(f"tokenizer.ggml.{name}", [absent] * rows))
    if len(column) != rows:
        raise ValueError(
            f"{path}: {rows} entries in tokenizer.ggml.tokens but {len(column)} in tokenizer.ggml.{name}; "
            "convert the model to GGUF again."
        )
    return column


def _vocabulary(metadata: Mapping[str, Any], path: str) -> tuple[list[str], list[int]]:
    tokens = list(_need(metadata, "tokenizer.ggml.tokens", path))
    types = _column(metadata, "token_type", len(tokens), NORMAL, path)
    if not tokens:
        raise ValueError(f"{path}: tokenizer.ggml.tokens is empty; convert the model to GGUF again.")
    if unknown := sorted(set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}):
        raise ValueError(f"{path}: unknown values {unknown} in tokenizer.ggml.token_type; known are 1 to 6.")
    seen: dict[str, int] = {}
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type != UNUSED and seen.setdefault(token, token_id) != token_id:
            raise ValueError(
                f"{path}: token {shown(token)} has two ids, {seen[token]} and {token_id}; convert the model again."
            )
    return tokens, types


def _added_tokens(
    metadata: Mapping[str, Any], kind: str, tokens: Sequence[str], types: Sequence[int]
) -> tuple[AddedToken, ...]:
    # GGUF has no place for rstrip, but Phi-3's published files set it on all added tokens except these three. Phi-4
    # has the same architecture name and no rstrip: its vocabulary is of the other kind, gpt2.
    phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    named, ends = ({metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names} for names in (_NAMED, _ENDS))
    template = template_text(metadata.get("tokenizer.chat_template"))
    added = []
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        # Early files of Phi-3 mark <|end|> and others as user-defined, and some files mark all tokens as normal; a user
        # who types it would then end the turn.
        is_marker = is_hidden(token, token_id in ends) and (token in template or token in END_NAMES or token_id in ends)
        if token and ((token_type == NORMAL and is_marker) or token_type in (UNKNOWN, CONTROL, USER_DEFINED)):
            hidden = is_hidden(token, token_type in (UNKNOWN, CONTROL) or token_id in named)
            added.append(
                AddedToken(
                    id=token_id,
                    content=token,
                    rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
                    special=is_special(token, hidden, template),
                    hidden=hidden,
                )
            )
    return tuple(added)


def _token_id(metadata: Mapping[str, Any], key: str, rows: int, path: str) -> int | None:
    if key not in metadata:
        return None
    token_id = int(metadata[key])
    if not 0 <= token_id < rows:
        raise ValueError(f"{path}: {key} is {token_id}, outside of the vocabulary of {rows} ids; correct the key.")
    return token_id


def _model(tokens: Sequence[str], types: Sequence[int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    vocab = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != UNUSED}
    return {"type": "BPE", "vocab": vocab, "merges": merges, **settings}


def _llama_spec(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: str
) -> tuple[dict[str, Any], bool]:
    """Sentencepiece BPE: any two pieces that spell a third may merge, the best score of the result first."""
    scores = _column(metadata, "scores", len(tokens), 0.0, path)
    ids = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == NORMAL}
    ranked = [
        (-scores[token_id], token_id, ids[token[:cut]], ids[token[cut:]], [token[:cut], token[cut:]])
        for token, token_id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == UNKNOWN), None)
    merges = [merge for *_, merge in sorted(ranked)]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = {
        "model": _model(tokens, types, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace] if prefix else [replace]},
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * prefix,
        },
    }
    return spec, True


def _gpt2_spec(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: str
) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE with the file's own merges; the file names the way words are split."""
    name = _need(metadata, "tokenizer.ggml.pre", path)
    pre = PRE_TOKENIZERS.get(_OTHER_NAMES.get(name, name))
    if pre is None:
        known = sorted([*PRE_TOKENIZERS, *_OTHER_NAMES])
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {shown(name)}, and known are {known}; load the model's Hugging Face folder."
        )
    merges = [merge.split(" ") for merge in _need(metadata, "tokenizer.ggml.merges", path)]
    if odd := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"{path}: tokenizer.ggml.merges holds {odd[:3]}, not pairs; convert the model to GGUF again.")
    spec = {
        "model": _model(tokens, types, merges, ignore_merges=pre.ignore_merges),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "decoder": _BYTE_LEVEL,
    }
    return spec, pre.add_bos

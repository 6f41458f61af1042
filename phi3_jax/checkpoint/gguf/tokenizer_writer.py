"""A tokenizer as the `tokenizer.*` metadata of a GGUF file: the inverse of tokenizer_reader.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from phi3_jax.checkpoint.gguf.tokenizer_reader import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_from_gguf,
)
from phi3_jax.text import Tokenizer
from phi3_jax.text.backends import SPACE_MARK, ByteLevelDecoder
from phi3_jax.text.tokenizer_files import read_document

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Texts with all that vocabularies differ in: spaces, digits, capitals, contractions, scripts, line ends, normal forms.
_PROBES = (
    "Hello, world! It's 1234567 o'clock; WE'LL see.",
    "  two  spaces\n\n\tand a tab \r\n x",
    "café cafe\u0301 Straße Ελλάδα русский 中文字符 日本語 한국어 عربى हिन्दी",
    "\ufb01 \u2460 \uff21 \U0001f600\U0001f468\u200d\U0001f469 \x00\x7f",
    "def f(x):\n    return x**2  # CamelCase snake_case {}[]<>|/\\",
)
_PIECES_TRIED = 2000


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """What a GGUF file says about a tokenizer, checked by reading it back and encoding texts with both.

    GGUF has no place for an added token's `lstrip`, `rstrip` and `single_word` (see `lost_flags`).

    Args:
      rows: of the embedding; ids that no token has are marked as unused.

    Raises:
      FileNotFoundError: the tokenizer's file, which is read again, is gone.
      ValueError: the tokenizer has more ids than rows, splits words in a way that has no name in GGUF, or cannot be
        written so that the same ids come out.
    """
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{tokenizer.source}: {tokenizer.vocab_size} ids, but the embedding has {rows} rows")
    byte_level = isinstance(tokenizer.new_decoder(), ByteLevelDecoder)
    specific = _byte_level_keys(tokenizer) if byte_level else _sentencepiece_keys(tokenizer, rows)
    unknown = specific.pop("unknown", None)
    tokens, types = _vocabulary(tokenizer, rows, unknown, byte_level)
    keys: dict[str, Any] = {
        "model": "gpt2" if byte_level else "llama",
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": tokenizer.add_bos,
        **specific,
    }
    opening = tokenizer.opening or tuple(i for i in (tokenizer.bos_id,) if i is not None)
    if len(opening) > 1 or tokenizer.closing not in ((), (tokenizer.eos_id,)):
        raise ValueError(
            f"{tokenizer.source}: it puts tokens around a text that are not one bos and one eos, for which GGUF has no "
            "words; export without the tokenizer"
        )
    if opening:
        keys["bos_token_id"] = opening[0]
    if tokenizer.closing:
        keys["add_eos_token"] = True
    if unknown is not None:
        keys["unknown_token_id"] = tokens.index(unknown)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.tool_chat_template is not None:
        metadata["tokenizer.chat_template.tool_use"] = tokenizer.tool_chat_template
    _check(tokenizer, metadata)
    return metadata


def lost_flags(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> list[str]:
    """Added tokens whose `lstrip`, `rstrip` or `single_word` is not what readers of the GGUF file will assume."""
    again = {token.id: token for token in tokenizer_from_gguf(metadata, tokenizer.source).added_tokens}
    return [
        token.content
        for token in tokenizer.added_tokens
        if any(getattr(token, flag) != getattr(again[token.id], flag) for flag in ("lstrip", "rstrip", "single_word"))
    ]


def _vocabulary(tokenizer: Tokenizer, rows: int, unknown: str | None, byte_level: bool) -> tuple[list[str], list[int]]:
    added = {token.id: token for token in tokenizer.added_tokens}
    pieces = [*tokenizer.pieces, *[None] * (rows - tokenizer.vocab_size)]
    taken, tokens, types = set(pieces), [], []
    for token_id, piece in enumerate(pieces):
        if piece is None:
            piece, kind = f"[PAD{token_id}]", UNUSED  # llama.cpp needs unique names
            while piece in taken:
                piece = f"[{piece}]"
        elif piece == unknown:
            kind = UNKNOWN
        elif token_id in added:
            kind = CONTROL if added[token_id].hidden else USER_DEFINED
        else:
            kind = BYTE if not byte_level and _BYTE_PIECE.fullmatch(piece) else NORMAL
        tokens.append(piece)
        types.append(kind)
    return tokens, types


def _byte_level_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    spec = _document(tokenizer)
    model, steps = spec["model"], _steps(spec.get("pre_tokenizer"))
    merges_first = not model.get("ignore_merges", False)
    names = [
        name
        for name, pre in PRE_TOKENIZERS.items()
        if _steps({"type": "Sequence", "pretokenizers": pre.steps}) == steps and pre.ignore_merges != merges_first
    ]
    if not names or spec.get("normalizer") is not None:
        raise ValueError(
            f"{tokenizer.source}: words are split in a way that has no name in GGUF; known are "
            f"{sorted(PRE_TOKENIZERS)}. Export without the tokenizer"
        )
    return {"pre": names[0], "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]}


def _steps(pre_tokenizer: Any) -> list[tuple[Any, ...]]:
    """A pre-tokenizer's steps in one standard form, so that different spellings of the same steps compare equal."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    if pre_tokenizer["type"] == "ByteLevel":
        return [("ByteLevel", pre_tokenizer["add_prefix_space"], pre_tokenizer.get("use_regex", True))]
    if pre_tokenizer["type"] == "Split":
        # A pattern that matches all of a text splits it alike if matches are kept or if what lies between is removed.
        kept = (pre_tokenizer["behavior"], pre_tokenizer["invert"]) in (("Isolated", False), ("Removed", True))
        return [("Split", kept, pre_tokenizer["pattern"].get("Regex"))]
    return [tuple(sorted(pre_tokenizer.items()))]


def _sentencepiece_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Scores (of two pairs that could merge, the one with the higher score does), unknown token, space prefix."""
    path = Path(tokenizer.source)
    if tokenizer.document is None and path.name == "tokenizer.model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        count = processor.get_piece_size()
        scores = [processor.get_score(i) for i in range(count)] + [0.0] * (rows - count)
        unknown = processor.id_to_piece(processor.unk_id())
        prefix = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        return {"scores": scores, "unknown": unknown, "add_space_prefix": prefix}
    spec = _document(tokenizer)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    # Pieces that no merge makes come last, in any order.
    scores = [-float(ranks.get(piece or "", len(ranks))) for piece in tokenizer.pieces]
    scores += [-float(len(ranks))] * (rows - len(scores))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    normalizer = spec.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    if steps not in ([replace], [prepend, replace]) or spec.get("pre_tokenizer") is not None:
        raise ValueError(
            f"{tokenizer.source}: its normaliser and pre-tokenizer treat spaces in a way that GGUF has no words for; "
            "use tokenizer.model instead of tokenizer.json, or export without the tokenizer"
        )
    unknown = spec["model"].get("unk_token")
    return {"scores": scores, "unknown": unknown, "add_space_prefix": steps != [replace]}


def _document(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """The contents of its tokenizer.json."""
    if tokenizer.document is not None:
        return tokenizer.document
    path = Path(tokenizer.source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the tokenizer's file, which is read again to export it, is gone")
    return read_document(path)


def _check(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    again = tokenizer_from_gguf(metadata, tokenizer.source)
    step = -(-tokenizer.vocab_size // _PIECES_TRIED)
    pieces = [tokenizer.decode([token_id]) for token_id in range(0, tokenizer.vocab_size, step)]
    for text in (*_PROBES, *pieces):
        if tokenizer.encode(text, add_bos=False) != again.encode(text, add_bos=False):
            raise ValueError(
                f"{tokenizer.source}: from GGUF's form of this tokenizer {text!r} would come out in other ids; "
                "export without the tokenizer"
            )

"""Small vocabularies made for the tests."""

import json
from pathlib import Path
from typing import Any

import sentencepiece


def train_sentencepiece(prefix: Path, text: str, **options: Any) -> None:
    """Trains a BPE model with byte fallback on a text and writes it as `prefix`.model."""
    corpus = prefix.with_name("corpus.txt")
    corpus.write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True} | options,
    )


def byte_level_spec(*more_pieces: str) -> dict[str, Any]:
    """A GPT-2 style tokenizer.json: 256 bytes, a few merges, and added tokens with every flag."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    merges = [["t", "h"], ["th", "e"], ["Ġ", "c"], ["c", "a"], ["1", "3"], ["<", "s"], ["<s", ">"]]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges), *more_pieces])}
    flags = {
        "<s>": {"special": True},
        "<|end|>": {"special": True, "rstrip": True},
        "<|endo|>": {"special": True, "lstrip": True},
        "<both>": {"special": False, "lstrip": True, "rstrip": True},
        "word": {"special": False, "single_word": True},
        "<|e": {"special": False},
    }
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    new = [content for content in flags if content not in vocab]
    ids = {content: vocab[content] if content in vocab else len(vocab) + new.index(content) for content in flags}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[c], "content": c, **blank, **f} for c, f in flags.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder

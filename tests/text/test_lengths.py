"""Long texts: refused by their length only where they cannot fit, and encoded in parts to the same ids."""

import dataclasses
import random
from pathlib import Path

import pytest
from templates import PHI4_MINI, small_tokenizer
from vocabularies import train_sentencepiece, write

from phi3_jax.text import Tokenizer, encode_chat, lengths, load_tokenizer

WORDS = [
    "the",
    "Cat",
    "a",
    "naïve",
    "日本語",
    "42",
    "<|end|>",
    "\n",
    "  ",
    "   ",
    "🙂",
    "\u2581",
    "foo\u2581bar",
    "I'm",
    "\t",
]
SPACED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def spaced(folder: Path, *more: str, **changes: object) -> Tokenizer:
    """A tokenizer as Phi-3 has, of the pieces of some letters and bytes, and of their merges."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581theCatnfoobr ", *more, "th", "the"]
    pieces += ["\u2581the", "at", "Cat", "\u2581Cat", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "foo", "oo"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(a[:n], a[n:]) for a in vocabulary for n in range(1, len(a)) if {a[:n], a[n:]} <= vocabulary.keys()]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    special = {"id": len(vocabulary), "content": "<|end|>", "special": True, "normalized": False, "rstrip": True}
    spec = {"model": model, "normalizer": SPACED, "pre_tokenizer": None, "added_tokens": [special]}
    steps = [SPACED["normalizers"][1] | {"pattern": {"String": "\u2581"}, "content": " "}]
    decoder = {"type": "Sequence", "decoders": [*steps, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return load_tokenizer(write(folder, {"tokenizer.json": spec | {"decoder": decoder} | changes}))


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(
        rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices("thCafo", k=rng.randint(1, 9)))
        for _ in range(words)
    )


def test_texts_in_parts_have_the_same_ids(tmp_path, monkeypatch):
    tokenizer, rng = spaced(tmp_path), random.Random(0)
    texts = [text_of(rng, rng.randint(5, 120)) for _ in range(200)]
    whole = [tokenizer.encode(text, parse_special=bool(i % 2)) for i, text in enumerate(texts)]
    monkeypatch.setattr(lengths, "_PART", 20)
    assert sum(len(list(lengths.cut(text))) for text in texts) > 1000
    assert [tokenizer.encode(text, parse_special=bool(i % 2)) for i, text in enumerate(texts)] == whole


@pytest.mark.parametrize("kind", ["bpe", "unigram"])  # the second one is not cut
def test_sentencepiece_gives_parts_the_same_ids(tmp_path, monkeypatch, kind):
    rng = random.Random(2)
    corpus = "\n".join(text_of(rng, 20) for _ in range(300))
    train_sentencepiece(tmp_path / "tokenizer", corpus, vocab_size=400, model_type=kind, byte_fallback=True)
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer_config.json": {}}))
    texts = [text_of(rng, rng.randint(5, 120)) for _ in range(200)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(lengths, "_PART", 20)
    assert [tokenizer.encode(text) for text in texts] == whole
    assert tokenizer.encoder._has_separate_words == (kind == "bpe")


@pytest.mark.parametrize(("more", "changes"), [(["t\u2581", "t\u2581th"], {}), ([], {"normalizer": None})])
def test_other_tokenizers_get_texts_whole(tmp_path, monkeypatch, more, changes):
    """Else a piece that reaches from one word into the next would be lost."""
    tokenizer, text = spaced(tmp_path, *more, **changes), "fat the Cat the " * 20
    whole = tokenizer.encode(text)
    for part in (1, 2, 5):
        monkeypatch.setattr(lengths, "_PART", part)
        assert tokenizer.encode(text) == whole


def test_what_fits_is_never_refused(tmp_path):
    """At the very number of ids that a text has; of letters that make the longest pieces, and of white space."""
    rng, tokenizers = random.Random(1), [spaced(tmp_path), small_tokenizer(PHI4_MINI)]
    assert [tokenizer.encoder.longest for tokenizer in tokenizers] == [len("<0x00>"), len("<|endoftext|>")]
    for tokenizer in tokenizers:
        for text in [
            " " * 999,
            "the" * 99,
            "<|end|>" + " " * 999,
            "<|end|>   " * 99,
            *(text_of(rng, 50) for _ in range(50)),
        ]:
            for parse_special in (True, False):
                ids = tokenizer.encode(text, parse_special=parse_special)
                assert tokenizer.encode(text, parse_special=parse_special, most=len(ids)) == ids
        chat = [{"role": "user", "content": "the <|end|> " * 99}]
        chatting = dataclasses.replace(tokenizer, chat_template=PHI4_MINI)
        ids = encode_chat(chatting, chat)
        assert encode_chat(chatting, chat, most=len(ids)) == ids


def test_what_cannot_fit_is_refused_before_it_is_encoded(tmp_path, monkeypatch):
    for tokenizer in (spaced(tmp_path), small_tokenizer(PHI4_MINI)):
        tokenizer = dataclasses.replace(tokenizer, chat_template=PHI4_MINI)
        monkeypatch.setattr(tokenizer.encoder, "encode", None)
        text = "a" * 500_000
        with pytest.raises(ValueError, match="the text has 500000 characters, which are more than 999 tokens: shorten"):
            tokenizer.encode(text, most=999)
        with pytest.raises(ValueError, match=r"the text has 5000\d\d characters, which are more than 999 tokens"):
            encode_chat(tokenizer, [{"role": "user", "content": text}], most=999)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        },  # without its letters
    ],
)
def test_texts_that_lose_characters_are_encoded(tmp_path, changes):
    tokenizer = spaced(tmp_path, **changes)
    assert tokenizer.encoder.longest is None
    text = "a" * 1000
    assert tokenizer.encode(text, most=1) == tokenizer.encode(text)


def test_sentencepiece_says_nothing_of_lengths(tmp_path):
    """Its normaliser may make one space of thousands."""
    train_sentencepiece(tmp_path / "tokenizer", "the cat sat\n" * 50, vocab_size=290)
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer_config.json": {}}))
    assert tokenizer.encode("the" + " " * 999, most=50) == tokenizer.encode("the" + " " * 999)

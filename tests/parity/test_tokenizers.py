"""The real Phi-3 vocabulary: the ids and texts of transformers' AutoTokenizer."""

import os
from typing import Any

import numpy as np
import pytest

import phi3_jax

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")
pytest.importorskip("transformers", reason="the reference needs torch and transformers: make parity")

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n \n\n  x",
    "The capital of France is",
    " leading and trailing  ",
    "don't, WON'T; 3.14159 and 1,000,000!",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café, Ünïcödé, e\u0301 (combining)",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا שלום नमस्ते",
    "🙂🙃 👩‍👩‍👧‍👦 🇫🇷 🏴‍☠️",
    "zero\u200bwidth nb\u00a0sp \ufeffbom \u2028line",
    "\u0000\u0001\u007f control",
    "▁ the mark itself ▁▁",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "<|system|>\nBe brief.<|end|>\n<|user|>\n  Hi  <|end|>\n<|assistant|>\n",
    "<|user|>  \n\t x<|end|>y<|endoftext|> z",
    "<s> a </s> b<unk>c",
    "<|placeholder1|><|placeholder6|>  <|end|><|end|>",
    "<|user|", "|user|>", "<|User|>", "< |user|>", "<|user|><|user|>",
    "<0x0A> and <0xFF>",
    "a" * 300,
    " ".join(str(i) for i in range(120)),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> str:
    if not os.environ.get("PHI3_TOKENIZER_DIR"):
        pytest.skip("PHI3_TOKENIZER_DIR does not name a folder with the Phi-3 tokenizer files")
    return os.environ["PHI3_TOKENIZER_DIR"]


@pytest.fixture(scope="module", params=["tokenizers", "sentencepiece"])
def ours(request, folder) -> phi3_jax.Tokenizer:
    return phi3_jax.load_tokenizer(folder, request.param)


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encode(ours, theirs, text):
    assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [False, True])
def test_decode(ours, theirs, text, skip):
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_decode_alike(ours, theirs, seed):
    """Broken UTF-8 among them: byte tokens in any order."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([rng.integers(0, 32011, 40), rng.integers(3, 259, 20)])
    rng.shuffle(ids)
    for skip in (False, True):
        assert ours.decode(ids.tolist(), skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("seed", range(20))
def test_random_text_encodes_alike(ours, theirs, seed):
    rng = np.random.default_rng(seed)
    pieces = [*TEXTS, "<|end|>", "<|user|>", "\n", " ", "  ", "é", "漢", "🙂", "</s>"]
    text = "".join(pieces[i][:25] for i in rng.integers(0, len(pieces), 12))
    assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"]

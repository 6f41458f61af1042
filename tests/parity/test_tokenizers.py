"""The ids and texts of transformers' AutoTokenizer: the real Phi-3 vocabulary, and random tokenizer folders."""

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_variants import random_folder, random_text
from vocabularies import write

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


@pytest.mark.parametrize("seed", range(15))
def test_random_tokenizer_folders(tmp_path: Path, seed: int) -> None:
    """Kinds of vocabulary, pre-tokenizers, decoders, post-processors, flags and settings; none of them is refused."""
    from transformers import AutoTokenizer

    rng = random.Random(seed)
    for case in range(12):
        folder = write(tmp_path / str(case), random_folder(rng))
        theirs = AutoTokenizer.from_pretrained(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*as in transformers")
            ours = phi3_jax.load_tokenizer(folder)
        assert theirs.bos_token in (None, ours.bos_token)
        assert theirs.eos_token == (ours.eos_token or None)
        opening = list(ours.opening)
        for _ in range(25):
            text = random_text(rng)
            plain, ids = theirs(text, add_special_tokens=False)["input_ids"], theirs(text)["input_ids"]
            assert ours.encode(text, parse_special=True, add_bos=False) == plain, (case, text)
            if opening and plain[: len(opening)] == opening:  # a second bos is never added
                ids = ids[len(opening) :]
            assert ours.encode(text, parse_special=True) == ids, (case, text)
            ids += [rng.randrange(len(theirs)) for _ in range(rng.randrange(6))]
            assert ours.decode(ids) == theirs.decode(ids), (case, ids)
            # What is hidden by its name, whatever its flag says, is not there for the reference either.
            shown = [i for i in ids if i not in ours.special_ids]
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(shown, skip_special_tokens=True)
            special = {token.id for token in ours.added_tokens if token.special}
            assert not special & set(ours.encode(text, add_bos=False)), (case, text)

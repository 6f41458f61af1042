"""Tokenizer files, of both kinds, and chat templates."""

from __future__ import annotations

import random
from pathlib import Path

import chat_templates
from spoiled import TEXT
from tokenizer_variants import random_folder
from vocabularies import train_sentencepiece, write

import phi3_jax

from ..reader import Read, Reader
from .parts import of_tokenizer


def _make_json(folder: Path, variant: int) -> None:
    files = random_folder(random.Random(variant))
    files["config.json"]["vocab_size"] = 500
    write(folder, files)


def _make_sentencepiece(folder: Path, variant: int) -> None:
    train_sentencepiece(folder / "tokenizer", TEXT, vocab_size=311, remove_extra_whitespaces=False)
    for path in folder.iterdir():
        if path.name != "tokenizer.model":
            path.unlink()
    end = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": True}
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "legacy": variant == 0}
    config["added_tokens_decoder"] = {"311": end}
    write(folder, {"tokenizer_config.json": config, "config.json": {"model_type": "phi3", "vocab_size": 320}})


def _load(folder: Path, _: int) -> Read:
    return of_tokenizer(phi3_jax.load_tokenizer(folder))


_TEMPLATES = sorted({**chat_templates.PUBLISHED}.values())


def _make_template(folder: Path, variant: int) -> None:
    _make_json(folder, 0)
    (folder / "chat_template.jinja").write_text(_TEMPLATES[variant])


READERS = {
    "tokenizer.json": Reader(_make_json, _load, 8, {"tokenizer.json": 4, "config.json": 0.5, "*": 2}),
    "sentencepiece": Reader(_make_sentencepiece, _load, 2, {"tokenizer.model": 3, "*": 1}),
    "template": Reader(_make_template, _load, len(_TEMPLATES), {"*.jinja": 1}, cost=1.5, names=("template",)),
}

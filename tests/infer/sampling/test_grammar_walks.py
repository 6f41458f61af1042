"""Random answers over real vocabularies: each token drawn from those that are allowed."""

import json
import os
import random
import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grammars import accepts

import phi3_jax
from phi3_jax.infer.sampling import Grammar
from phi3_jax.infer.sampling.grammar import GrammarMasks
from phi3_jax.text import Tokenizer, load_tokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")


@pytest.fixture(scope="module", params=["demo", "phi3 tokenizers", "phi3 sentencepiece"])
def real(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[int], int]:
    """(tokenizer, end ids, rows of the embedding)."""
    if request.param == "demo":
        demo: phi3_jax.Checkpoint = request.getfixturevalue("demo")
        assert demo.tokenizer is not None
        return demo.tokenizer, list(demo.generation.eos_token_ids), demo.config.vocab_size
    if not (folder := os.environ.get("PHI3_TOKENIZER_DIR")):
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    return load_tokenizer(folder, request.param.split()[1]), [32000, 32001, 32007], 32064


def random_answers(real: tuple[Tokenizer, list[int], int], grammar: Grammar, rows: int, seed: int) -> list[str]:
    """What rows write that draw from the allowed tokens, half of the time a long one; every one must end."""
    tokenizer, end_ids, vocab_size = real
    rng = random.Random(seed)
    masks = GrammarMasks(tokenizer, [grammar] * rows, end_ids, vocab_size)
    texts, streams = [""] * rows, [tokenizer.stream(skip_special_tokens=True) for _ in range(rows)]
    open_rows = set(range(rows))
    for _ in range(200):
        bits = np.unpackbits(masks.masks().view(np.uint8), axis=1, bitorder="little")
        for row in sorted(open_rows):
            choices = np.flatnonzero(bits[row])
            tokens = [int(rng.choice(choices)) for _ in range(rng.choice([1, 5]))]
            token = max(tokens, key=lambda token: 99 if token in end_ids else len(tokenizer.token_bytes(token)))
            masks.push(row, token)
            if token in end_ids:
                open_rows.remove(row)
            else:
                texts[row] += streams[row].push(token)
    assert not open_rows
    return [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]


def check_person(value: Any) -> None:
    assert list(value) == ["name", "age", "member", "level"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 20
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert type(value["member"]) is bool
    assert value["level"] in ("low", "mid dle", "höch", "\U0001f600/\"'\n")


def check_numbers(value: Any) -> None:
    assert isinstance(value, list)
    assert 2 <= len(value) <= 4
    for number in value:
        assert type(number) in (int, float)
        assert -10 <= number <= 1000.5


def check_nested(value: Any) -> None:
    assert set(value) in ({"id", "place"}, {"id", "place", "note"})
    assert re.fullmatch("[A-Z]{2}[0-9]{3}", value["id"])
    assert set(value["place"]) == {"city", "at"}
    assert value["place"]["city"] is None or len(value["place"]["city"]) <= 12
    assert len(value["place"]["at"]) == 2
    assert all(type(x) is int and -90 <= x <= 90 for x in value["place"]["at"])
    assert "note" not in value or value["note"] in (1, 2.5, None, "x")


def object_of(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], None]]] = [
    (
        object_of(
            {
                "name": {"type": "string", "maxLength": 20},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "member": {"type": "boolean"},
                "level": {"enum": ["low", "mid dle", "höch", "\U0001f600/\"'\n"]},
            },
            ["name", "age", "member", "level"],
        ),
        check_person,
    ),
    (
        {
            "type": "array",
            "items": {"type": "number", "minimum": -10, "maximum": 1000.5},
            "minItems": 2,
            "maxItems": 4,
        },
        check_numbers,
    ),
    (
        object_of(
            {
                "id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
                "place": object_of(
                    {
                        "city": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]},
                        "at": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": -90, "maximum": 90},
                            "minItems": 2,
                            "maxItems": 2,
                        },
                    },
                    ["city", "at"],
                ),
                "note": {"enum": [1, 2.5, None, "x"]},
            },
            ["id", "place"],
        ),
        check_nested,
    ),
]


@pytest.mark.parametrize(("schema", "check"), SCHEMAS)
def test_random_answers_are_json_of_the_schema(
    real: tuple[Tokenizer, list[int], int], schema: dict[str, Any], check: Callable[[Any], None]
) -> None:
    texts = random_answers(real, Grammar.json_schema(schema), rows=29, seed=61)
    assert len(set(texts)) > 20
    for text in texts:
        check(json.loads(text))


@pytest.mark.parametrize(
    "pattern", [r" ?[A-Z][a-zé]{1,11}(, [\d.]{0,7}){0,3}[.!?]", r"\s\d{1,3}|[^\x00-\x7f]{1,5}", r"(\n|/|\\ ){7,13}"]
)
def test_random_answers_match_the_pattern(real: tuple[Tokenizer, list[int], int], pattern: str) -> None:
    texts = random_answers(real, Grammar.regex(pattern), rows=31, seed=67)
    assert len(set(texts)) > 20
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_random_answers_are_one_of_the_options(real: tuple[Tokenizer, list[int], int]) -> None:
    options = ["yes", "yes, please", " yes", "no", "<|end|>", "42", "日本\U0001f600", "  two\nlines", "▁x", "</s>"]
    texts = random_answers(real, Grammar.choice(options), rows=131, seed=71)
    assert set(texts) == set(options)


def test_what_the_tokenizer_writes_is_allowed(real: tuple[Tokenizer, list[int], int]) -> None:
    """Not only odd spellings: the tokens that a model would pick."""
    tokenizer, end_ids, _ = real
    for text in ("yes", " yes", '{"a": "héllo wörld \U0001f600"}', "5", string.printable.strip()):
        assert accepts(tokenizer, Grammar.choice([text, "other"]), text, end_ids[0]), text

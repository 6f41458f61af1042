"""Tokens as a reader sees them: the pieces of a prompt, and the texts of all ids that a report names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phi3_jax.text import Tokenizer

Report = dict[str, Any]


def tokens(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens of a prompt: the id, the vocabulary's piece, the text, and its bytes, which may cut a character."""

    def one(place: int, token: int) -> dict[str, Any]:
        own = piece(tokenizer, token)
        data = b"" if own is None or tokenizer is None else tokenizer.token_bytes(token, opens_text=place == 0)
        return {"id": token, "piece": own, "text": text_of(tokenizer, token, place == 0), "bytes": list(data)}

    return [one(place, int(token)) for place, token in enumerate(ids)]


def piece(tokenizer: Tokenizer | None, token: int) -> str | None:
    """The vocabulary's string for an id; None if it has nothing: some embeddings have more rows than it has pieces."""
    return None if tokenizer is None or token >= tokenizer.vocab_size else tokenizer.piece(token)


def text_of(tokenizer: Tokenizer | None, token: int, opens_text: bool = False) -> str:
    """What a token adds to a text; "<17>" for an id without any, and U+FFFD for parts of a character."""
    return _bytes(tokenizer, token, opens_text).decode("utf-8", "replace")


def joined(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    """What tokens add to a text together: a character whose bytes several of them share is whole."""
    return b"".join(_bytes(tokenizer, token) for token in ids).decode("utf-8", "replace")


def _bytes(tokenizer: Tokenizer | None, token: int, opens_text: bool = False) -> bytes:
    if tokenizer is None or piece(tokenizer, token) is None:
        return f"<{token}>".encode()
    return tokenizer.token_bytes(token, opens_text=opens_text)


def add_vocabulary(report: Report, tokenizer: Tokenizer | None) -> None:
    """Puts the texts of all ids that the report's sections name into its "vocabulary"."""
    report["vocabulary"] = {str(token): text_of(tokenizer, token) for token in sorted(set(_named(report)))}


def _named(report: Report) -> Iterator[int]:
    """The ids in all sections; pairs and triples [id, number, ...] begin with theirs."""
    yield from (token["id"] for token in report["tokens"])
    for row in report.get("embedding", {}).get("nearest", []):
        yield from (pair[0] for pair in row)
    for layers in report.get("lens", {}).values():
        yield from (pair[0] for layer in layers for place in layer for pair in place)
    if "attribution" in report:
        yield report["attribution"]["id"]
    yield from (entry[0] for entry in report.get("next", {}).get("top", []))
    generation = report.get("generation", {})
    for step in [*generation.get("greedy", []), *generation.get("sampled", [])]:
        yield from (step["id"], *(pair[0] for pair in step["runners"]))
    yield from (pair[0] for pair in report.get("comparison", {}).get("top", []))

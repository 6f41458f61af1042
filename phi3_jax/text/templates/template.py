"""A tokenizer's chat template, and what it makes of plain data."""

import re
from collections.abc import Sequence
from typing import Any

from phi3_jax.text.templates import process
from phi3_jax.text.tokenizer import Tokenizer

# Code points that Unicode reserves for a program's own use; real text does not contain them.
NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


_HALF = re.compile("[\ud800-\udfff]")


def render(
    tokenizer: Tokenizer, given: dict[str, Any], characters: int, palettes: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """What the checkpoint's template writes: plain, and once in the colours of each palette.

    Args:
        given: the names that the template may use, on top of bos_token and eos_token.
        characters: how long the texts in them are.
        palettes: as in `sandbox.run`.

    Raises:
        ValueError: no template, or one that fails, refuses the messages, or takes too much time or memory.
    """
    source = require_template(tokenizer)
    try:
        texts = process.run(source, _names(tokenizer) | given, characters, palettes)
    except ValueError as error:
        raise ValueError(f"{tokenizer.source}: {_line(error)}") from None
    if _HALF.search(texts[0]):
        raise ValueError(
            f"{tokenizer.source}: what the chat template writes has half of a surrogate pair in it, which is no text."
        )
    return texts


def vocabulary(tokenizer: Tokenizer) -> process.Vocabulary:
    """What the checkpoint's template speaks of. Raises ValueError if there is none, or it cannot be parsed."""
    source = require_template(tokenizer)
    try:
        return process.vocabulary(source)
    except ValueError as error:
        raise ValueError(f"{tokenizer.source}: {_line(error)}") from None


def _line(error: ValueError) -> str:
    """What an error says, on one line; a template that writes its own must not steer terminals."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(error).split()))


def own_names(tokenizer: Tokenizer, given: dict[str, Any]) -> list[str]:
    """The names among those that the template may use that the tokenizer gives it."""
    return [name for name in _names(tokenizer) if name not in given]


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return {**tokenizer.named_tokens} | {name: token for name, token in names.items() if token}


def for_chat(tokenizer: Tokenizer, has_tools: bool) -> Tokenizer:
    """The tokenizer with the template for this chat: some checkpoints have another one, tool_use, for tools.

    Raises:
        ValueError: there is no template.
    """
    chosen = tokenizer.for_tools if has_tools else tokenizer
    require_template(chosen)
    return chosen


def require_template(tokenizer: Tokenizer) -> str:
    """The template's source. Raises ValueError if there is none."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.source}: the checkpoint has no chat template; "
            "put one into chat_template.jinja beside the tokenizer, or encode plain text."
        )
    return tokenizer.chat_template

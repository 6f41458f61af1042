"""Which tokens of a conversation an assistant says, for training."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi3_jax.text.chat import dropped
from phi3_jax.text.messages import Chat, Message, Tool, read_chat
from phi3_jax.text.spans import Span, encode_spans
from phi3_jax.text.templates.literals import Literals, unused_noncharacter
from phi3_jax.text.templates.template import for_chat
from phi3_jax.text.tokenizer import Tokenizer

# Llama 3.1 ends a call of its built-in tools with a token of its own.
_MORE_ENDS = ["<|eom_id|>"]


def encode_answers(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[Span]]:
    """Token ids of a conversation up to its last answer, and the ranges of the assistant's answers, for training.

    The ids are those of `encode_chat` without a generation prompt. An answer is what the template writes of an
    assistant's message (its content, tool calls and reasoning) and the special token that ends its turn; the role's
    header before it and a newline after it are not part of it.

    Returns:
      ids, and the range [begin, end) of indices into them for each message of an assistant.

    Raises:
        ValueError: as in `encode_chat`; or there is no answer, the template ends answers with no special token or
            rewrites them or drops something, or the tokenizer makes one token of a header's end and an answer's
            beginning.
    """
    chat = read_chat(messages, tools, template_options)
    tokenizer = for_chat(tokenizer, tools is not None)
    last = max((i for i, message in enumerate(chat.messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError('no message has the role "assistant", so that there is no answer to learn.')
    chat = dataclasses.replace(chat, messages=chat.messages[: last + 1])
    literals = Literals(tokenizer, chat)
    text, spans = _find_answers(tokenizer, chat, literals)
    if lost := dropped(tokenizer, chat, add_generation_prompt=False):
        raise ValueError(lost[0])
    return encode_spans(tokenizer, text, spans, parse_special=True, add_bos=False, literal_mark=literals.mark)


def _find_answers(tokenizer: Tokenizer, chat: Chat, literals: Literals) -> tuple[str, list[Span]]:
    """The rendered conversation, which ends with an answer, and the characters of its answers with their end tokens."""
    ready = literals.prepare(add_generation_prompt=False)
    text = literals.render(ready, add_generation_prompt=False)
    border = unused_noncharacter(tokenizer, ready)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    rewritten = [i for i in answers if _is_rewritten(chat.messages[i])]
    said = [i for i in answers if i not in rewritten]
    found: dict[int, Span] = {}
    if said:
        pieces = _bordered(tokenizer, ready, literals, said, border, text)
        ending = _ending(tokenizer, pieces[2::2])
        starts = list(itertools.accumulate(map(len, pieces), initial=0))
        spans = [(starts[i], starts[i + 1] + len(ending)) for i in range(1, len(pieces), 2)]
        found = dict(zip(said, spans, strict=True))
    elif rewritten:  # what would follow if the last answer were plain
        pieces = _render_bordered(ready, literals, rewritten[-1:], border, str, plain=True)
        ending = _ending(tokenizer, pieces[2:])
    for index in rewritten:
        start = _start(tokenizer, ready, literals, index, border, text)
        ends = [text.find(end, start) + len(end) for end in [ending.strip(), *_MORE_ENDS] if end in text[start:]]
        if not ends:
            raise ValueError(_not_as_said(tokenizer))
        found[index] = (start, min(ends))
    return text, [found[index] for index in answers]


def _is_rewritten(message: dict[str, Any]) -> bool:
    """Whether an answer is more than its content, so that it is not looked for by that."""
    return bool(message.get("tool_calls") or message.get("reasoning_content") or "</think>" in message["content"])


def _bordered(
    tokenizer: Tokenizer, ready: Chat, literals: Literals, indices: list[int], border: str, text: str
) -> list[str]:
    """The text in pieces: every second one is the content of one of these messages."""
    for prepare in (str, str.strip, str.rstrip, str.lstrip):  # the template may strip what is said
        pieces = _render_bordered(ready, literals, indices, border, prepare)
        if "".join(pieces) == text and len(pieces) == 1 + 2 * len(indices):
            return pieces
    raise ValueError(_not_as_said(tokenizer))


def _render_bordered(
    ready: Chat, literals: Literals, indices: list[int], border: str, prepare: Callable[[str], str], plain: bool = False
) -> list[str]:
    """The conversation, cut before and after the contents of these messages, which are all that is left if `plain`."""
    messages = list(ready.messages)
    for index in indices:
        kept = {"role": messages[index]["role"]} if plain else messages[index]
        content = "" if plain else messages[index].get("content") or ""  # a template may cut thoughts off
        messages[index] = kept | {"content": border + prepare(content) + border}
    chat = dataclasses.replace(ready, messages=messages)
    return literals.render(chat, add_generation_prompt=False).split(border)


def _ending(tokenizer: Tokenizer, pieces: list[str]) -> str:
    """The special token that all of the pieces begin with, and white space before it."""
    specials = [token.content for token in tokenizer.added_tokens if token.special]
    ending = re.match(
        rf"\s*({'|'.join(map(re.escape, sorted(specials, key=len, reverse=True)))})", (pieces or [""])[-1]
    )
    if not specials or ending is None or not all(piece.startswith(ending[0]) for piece in pieces):
        raise ValueError(
            f"{tokenizer.source}: the chat template does not end every answer with one and the same special token, so "
            "a model could not learn to stop; use a template that does, or learn all of the text."
        )
    return ending[0]


def _start(tokenizer: Tokenizer, ready: Chat, literals: Literals, index: int, border: str, text: str) -> int:
    """Where an answer begins: behind what the model is asked with, or else behind a plain answer's header."""
    before = dataclasses.replace(ready, messages=ready.messages[:index])
    asked, unasked = (literals.render(before, add) if index else border for add in (True, False))
    try:
        header = _render_bordered(ready, literals, [index], border, str, plain=True)[0]
    except ValueError:  # the template refuses a plain answer in this place
        header = asked
    # Without a header to ask with, or with another one for earlier turns.
    starts = [header, header.rstrip(), asked] if asked == unasked else [asked, header, header.rstrip()]
    for start in starts:
        if text.startswith(start):
            return len(start)
    raise ValueError(_not_as_said(tokenizer))


def _not_as_said(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.source}: the chat template does not write answers as they are said."

"""Which tokens of a conversation an assistant says, for training."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi3_jax.text.chat import dropped
from phi3_jax.text.messages import Chat, Message, Tool, read_chat
from phi3_jax.text.spans import Span, encode_spans
from phi3_jax.text.templates.literals import judge, unused_noncharacter, write
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
    written = judge(tokenizer, chat, add_generation_prompt=False)
    mark = unused_noncharacter(tokenizer, chat, written.text)
    text = written.marked(mark)
    spans = _find_answers(tokenizer, chat, written.text)
    if lost := dropped(tokenizer, chat, add_generation_prompt=False):
        raise ValueError(lost[0])
    spans = [(written.place(begin), written.place(end)) for begin, end in spans]
    return encode_spans(tokenizer, text, spans, parse_special=True, add_bos=False, literal_mark=mark)


def _find_answers(tokenizer: Tokenizer, chat: Chat, text: str) -> list[Span]:
    """The characters of the answers with their end tokens in the rendered conversation, which ends with an answer."""
    border = unused_noncharacter(tokenizer, chat, text)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    rewritten = [i for i in answers if _is_rewritten(chat.messages[i])]
    said = [i for i in answers if i not in rewritten]
    found: dict[int, Span] = {}
    if said:
        pieces = _bordered(tokenizer, chat, said, border, text)
        ending = _ending(tokenizer, pieces[2::2])
        starts = list(itertools.accumulate(map(len, pieces), initial=0))
        spans = [(starts[i], starts[i + 1] + len(ending)) for i in range(1, len(pieces), 2)]
        found = dict(zip(said, spans, strict=True))
    elif rewritten:  # what would follow if the last answer were plain
        pieces = _render_bordered(tokenizer, chat, rewritten[-1:], border, str, plain=True)
        ending = _ending(tokenizer, pieces[2:])
    for index in rewritten:
        start = _start(tokenizer, chat, index, border, text)
        ends = [text.find(end, start) + len(end) for end in [ending.strip(), *_MORE_ENDS] if end in text[start:]]
        if not ends:
            raise ValueError(_not_as_said(tokenizer))
        found[index] = (start, min(ends))
    return [found[index] for index in answers]


def _is_rewritten(message: dict[str, Any]) -> bool:
    """Whether an answer is more than its content, so that it is not looked for by that."""
    return bool(message.get("tool_calls") or message.get("reasoning_content") or "</think>" in message["content"])


def _bordered(tokenizer: Tokenizer, chat: Chat, indices: list[int], border: str, text: str) -> list[str]:
    """The text in pieces: every second one is the content of one of these messages."""
    for prepare in (str, str.strip, str.rstrip, str.lstrip):  # the template may strip what is said
        pieces = _render_bordered(tokenizer, chat, indices, border, prepare)
        if "".join(pieces) == text and len(pieces) == 1 + 2 * len(indices):
            return pieces
    raise ValueError(_not_as_said(tokenizer))


def _render_bordered(
    tokenizer: Tokenizer,
    chat: Chat,
    indices: list[int],
    border: str,
    prepare: Callable[[str], str],
    plain: bool = False,
) -> list[str]:
    """The conversation, cut before and after the contents of these messages, which are all that is left if `plain`."""
    messages = list(chat.messages)
    for index in indices:
        kept = {"role": messages[index]["role"]} if plain else messages[index]
        content = "" if plain else messages[index].get("content") or ""  # a template may cut thoughts off
        messages[index] = kept | {"content": border + prepare(content) + border}
    chat = dataclasses.replace(chat, messages=messages)
    return write(tokenizer, chat, add_generation_prompt=False).split(border)


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


def _start(tokenizer: Tokenizer, chat: Chat, index: int, border: str, text: str) -> int:
    """Where an answer begins: behind what the model is asked with, or else behind a plain answer's header."""
    before = dataclasses.replace(chat, messages=chat.messages[:index])
    asked, unasked = (write(tokenizer, before, add) if index else border for add in (True, False))
    try:
        header = _render_bordered(tokenizer, chat, [index], border, str, plain=True)[0]
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

"""Messages -> prompt, with the checkpoint's chat template.

A template is a jinja2 program from a file that somebody else wrote: it runs in jinja2's sandbox, with bounded sizes.
What a message says is text: a `<|end|>` in it stays plain text and never ends the turn.
"""

import itertools
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from phi3_jax.text.spans import Span, encode_spans
from phi3_jax.text.tokenizer import Tokenizer

Message = Mapping[str, str]

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_GENERATED_CHARACTERS = 1_000_000  # written by the template itself, on top of the messages

# Code points that Unicode reserves for a program's own use; real text does not contain them.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The conversation as the checkpoint's template writes it.

    Args:
        messages: dicts with exactly the keys "role" and "content", both strings.
        add_generation_prompt: end with the header of the assistant's next turn.

    Raises:
        ValueError: messages of another shape, no template, or a template that fails or refuses the messages.

    Warns:
        UserWarning: the template drops a message, for example because it does not know the role.
    """
    plain = _validated(messages)
    text = _render(tokenizer, plain, add_generation_prompt)
    _warn_of_dropped(tokenizer, plain, add_generation_prompt)
    return text


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of the rendered conversation. Arguments, errors and warnings as in `render_chat`.

    Special tokens written by the template become their ids; the same strings in roles and contents stay text, encoded
    in their place, so that the text around them gets its usual ids. bos is there only if the template writes it.
    """
    plain = _validated(messages)
    mark = _unused_noncharacter(tokenizer, plain)
    text = _render(tokenizer, [_defused(tokenizer, message, mark) for message in plain], add_generation_prompt)
    _warn_of_dropped(tokenizer, plain, add_generation_prompt)
    return tokenizer.encode(text, parse_special=True, add_bos=False, literal_mark=mark)


def encode_answers(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
    """Token ids of a conversation up to its last answer, and the ranges of the assistant's answers, for training.

    The ids are those of `encode_chat` without a generation prompt. An answer is the content of an assistant's message
    and the special token that ends its turn; the role's header before it and a newline after it are not part of it.

    Returns:
      ids, and the range [begin, end) of indices into them for each message of an assistant.

    Raises:
        ValueError: as in `encode_chat`; or there is no answer, the template ends answers with no special token or
            rewrites them or drops a message, or the tokenizer makes one token of a header's end and an answer's
            beginning.
    """
    plain = _validated(messages)
    last = max((i for i, message in enumerate(plain) if message["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError('no message has the role "assistant", so that there is no answer to learn.')
    plain = plain[: last + 1]
    mark = _unused_noncharacter(tokenizer, plain)
    text, spans = _find_answers(tokenizer, [_defused(tokenizer, message, mark) for message in plain], mark)
    if dropped := _dropped(tokenizer, plain, generation_prompt=False):
        raise ValueError(dropped[0])
    return encode_spans(tokenizer, text, spans, parse_special=True, add_bos=False, literal_mark=mark)


def _find_answers(tokenizer: Tokenizer, messages: list[dict[str, str]], mark: str) -> tuple[str, list[Span]]:
    """The rendered conversation, which ends with an answer, and the characters of its answers with their end tokens."""
    text = _render(tokenizer, messages, add_generation_prompt=False)
    border = _unused_noncharacter(tokenizer, [*messages, {"content": mark}])
    for prepare in (str, str.strip):  # the template may strip what is said
        bordered = [
            m | {"content": border + prepare(m["content"]) + border} if m["role"] == "assistant" else m
            for m in messages
        ]
        pieces = _render(tokenizer, bordered, add_generation_prompt=False).split(border)
        if "".join(pieces) == text and len(pieces) == 1 + 2 * sum(m["role"] == "assistant" for m in messages):
            break
    else:
        raise ValueError(f"{tokenizer.source}: the chat template does not write answers as they are said.")
    specials = [token.content for token in tokenizer.added_tokens if token.special]
    ending = re.match(rf"\s*({'|'.join(map(re.escape, sorted(specials, key=len, reverse=True)))})", pieces[-1])
    if not specials or ending is None or not all(piece.startswith(ending[0]) for piece in pieces[2::2]):
        raise ValueError(
            f"{tokenizer.source}: the chat template does not end every answer with one and the same special token, so "
            "a model could not learn to stop; use a template that does, or learn all of the text."
        )
    starts = list(itertools.accumulate(map(len, pieces), initial=0))
    return text, [(starts[i], starts[i + 1] + len(ending[0])) for i in range(1, len(pieces), 2)]


def _defused(tokenizer: Tokenizer, message: dict[str, str], mark: str) -> dict[str, str]:
    return {key: _defuse(tokenizer, value, mark) for key, value in message.items()}


def _validated(messages: Sequence[Message]) -> list[dict[str, str]]:
    shape = 'pass a list of {"role": str, "content": str}.'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is a {type(messages).__name__}; {shape}")
    if not messages:
        raise ValueError(f"messages is empty; {shape}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"messages[{index}] is {message!r}; {shape}")
        for key, value in message.items():
            if not isinstance(value, str):
                raise ValueError(f"messages[{index}][{key!r}] is a {type(value).__name__}; {shape}")
    return [dict(message) for message in messages]


def _unused_noncharacter(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    text = "".join(value for message in messages for value in message.values()) + (tokenizer.chat_template or "")
    mark = next((c for c in _NONCHARACTERS if c not in text), None)
    if mark is None:
        raise ValueError("The messages hold every noncharacter from U+FDD0 to U+FDEF; remove one of them.")
    return mark


def _defuse(tokenizer: Tokenizer, text: str, mark: str) -> str:
    """Puts the mark behind the first character of every special token's string, overlapping ones included."""
    specials = [token.content for token in tokenizer.added_tokens if token.special]
    present = [content for content in specials if content in text]
    if short := [content for content in present if len(content) == 1]:
        raise ValueError(f"A message holds {short}, special tokens of one character; remove them from the messages.")
    # A look-ahead consumes nothing, so a string that starts inside of another one is found too.
    return re.sub(f"(?=({'|'.join(map(re.escape, present))}))(.)", rf"\2{mark}", text, flags=re.S) if present else text


def _dropped(tokenizer: Tokenizer, messages: list[dict[str, str]], generation_prompt: bool) -> list[str]:
    """Says of each message that the template does not write, because of its role or its place, what to do instead."""
    # Searching for the content is not enough: another message may have the same.
    probe = _unused_noncharacter(tokenizer, messages)
    marks = [f"{probe}{index}{probe}" for index in range(len(messages))]
    probed = [message | {"content": message["content"] + mark} for message, mark in zip(messages, marks, strict=True)]
    text = _render(tokenizer, probed, generation_prompt)
    found = []
    for index, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        if mark not in text:
            which = "the system message" if message["role"] == "system" else f"messages[{index}]"
            what = f"{tokenizer.source}: the checkpoint's chat template drops {which}, of role {message['role']!r}; "
            found.append(what + "put its text into a message of the user, or use a role that the template knows.")
    return found


def _warn_of_dropped(tokenizer: Tokenizer, messages: list[dict[str, str]], generation_prompt: bool) -> None:
    for text in _dropped(tokenizer, messages, generation_prompt):
        warnings.warn(text, UserWarning, stacklevel=3)


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.source}: the checkpoint has no chat template; "
            "put one into chat_template.jinja beside the tokenizer, or encode plain text."
        )
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    variables: dict[str, Any] = {name: token for name, token in names.items() if token}
    variables |= {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    room = MAX_GENERATED_CHARACTERS + sum(len(message["content"]) for message in messages)
    chunks = []
    try:
        for chunk in _compile(tokenizer.chat_template).generate(variables):
            chunks.append(chunk)
            room -= len(chunk)
            if room < 0:
                raise jinja2.TemplateError(f"more than {MAX_GENERATED_CHARACTERS} characters written")
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{tokenizer.source}: syntax error in the chat template, line {error.lineno}: {error}"
        ) from error
    except jinja2.TemplateError as error:
        raise ValueError(f"{tokenizer.source}: the chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{tokenizer.source}: the chat template fails on these messages: {error!r}") from error
    return "".join(chunks)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox; `'a' * 10**11` is refused too, before it is computed."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        size = 1
        for value in (left, right):
            size *= len(value) if isinstance(value, str | list | tuple) else abs(value)
        if operator == "**" or size > MAX_GENERATED_CHARACTERS:
            raise jinja2.TemplateError(f"the result of {operator} would be too large")
        return left * right


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The template in the environment that Hugging Face chat templates expect."""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise jinja2.TemplateError(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    del environment.globals["lipsum"]  # generates filler text of any length
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces jinja2's own filter, which escapes HTML: chat templates expect plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

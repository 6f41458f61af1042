"""The fields of a line, in the forms that data sets are published in -> chats and plain texts.

The README's table lists the forms. A field that is null is absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from .json_array import decode
from .messages import Message, Notes, from_json, present, read_messages, shared, with_system

_CHATS = ("messages", "conversations", "conversation")
_ASKED = ("instruction", "question", "query")
_ANSWERED = ("output", "response", "answer")
_MORE = ("input", "context")  # beside what is asked: what it is about
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_ROLES = ("prompter", "user", "human", "assistant", "gpt", "system")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_NEEDED = {
    "sft": "messages, or completion and prompt, or text, or instruction and output",
    "dpo": "chosen and rejected, with messages or prompt",
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation whose answers are learned where the message says so; tools and options are for the template."""

    messages: list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Plain:
    """A text in no template, of which the completion is learned; if it is longer than a row, it may be cut."""

    prompt: str
    completion: str
    may_be_cut: bool = False


def read_form(record: dict[str, Any], method: str) -> tuple[list[Chat | Plain], Notes]:
    """What a line has to learn: with method "sft" one text, with "dpo" two, the chosen one first.

    Raises:
      ValueError: the fields are in no known form, or contradict one another.
    """
    line = _Line(present(record), method)
    texts = line.preference() if method == "dpo" else [line.single()]
    line.notes.unused |= line.fields.keys() - line.used
    return texts, line.notes


def digest(forms: Sequence[Chat | Plain]) -> int:
    """A hash of 64 bits by which equal lines are known; fields that are not used do not matter."""
    try:
        content = json.dumps(forms, sort_keys=True, default=lambda each: getattr(each, "__dict__", None) or str(each))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


class _Line:
    """The fields of a line, and which of them were used."""

    def __init__(self, fields: dict[str, Any], method: str):
        self.method = method
        self.notes, self.used = Notes(), set(_NOT_TEXT)  # these are empty or refused
        self.fields = {name: _written_out(name, value) for name, value in self._openai(fields).items()}
        self._refuse_what_would_get_lost()

    # ---------------------------------------------------------------- the forms

    def single(self) -> Chat | Plain:
        chat = self._one_of(_CHATS)
        has = self.fields.keys().__contains__
        if chat and not has("text") and not has("completion") and not isinstance(self.fields.get("chosen"), str):
            return self._chat(self._messages(chat))
        if has("prompt") and has("completion") and not chat and not has("text"):
            if isinstance(self.fields["prompt"], str):
                return self._plain(self._string("prompt"), self._string("completion"))
            self.notes.converted.add("prompt and completion -> messages")
            context, completion = self._messages("prompt"), self.fields["completion"]
            if isinstance(completion, str):
                return self._reply(context, [_said("assistant", self._string("completion"))])
            return self._reply(context, self._messages("completion"))
        asked, answered = self._one_of(_ASKED), self._one_of(_ANSWERED)
        if asked and answered and not chat and not has("completion"):
            context = self._asked(asked)
            self.notes.converted.add(f"{asked} and {answered} -> messages")
            return self._chat([*context, _said("assistant", self._string(answered))])
        if has("text") and not chat and not has("prompt") and not has("completion"):
            return self._plain("", self._string("text"), may_be_cut=True)
        raise self._no_form()

    def preference(self) -> list[Chat | Plain]:
        if not {"chosen", "rejected"} <= self.fields.keys():
            raise self._no_form()
        chosen, rejected = self.fields["chosen"], self.fields["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            return self._preference_of_strings(self._string("chosen"), self._string("rejected"))
        return self._preference_of_messages(self._messages("chosen"), self._messages("rejected"))

    def _preference_of_strings(self, chosen: str, rejected: str) -> list[Chat | Plain]:
        chat, asked = self._one_of(_CHATS), self._one_of(_ASKED)
        prompt = self.fields.get("prompt")
        if (chat and prompt is not None) or (asked and (chat or prompt is not None)):
            raise self._no_form()
        if isinstance(prompt, str):
            prompt = self._string("prompt")
        elif prompt is not None or chat or asked:
            context = self._asked(asked) if asked else self._messages(chat or "prompt")
            if asked:
                self.notes.converted.add(f"{asked} -> a message of the user")
            return [self._reply(context, [_said("assistant", text)]) for text in (chosen, rejected)]
        else:
            if more := self._one_of(_MORE):
                raise ValueError(
                    f"it has {more} beside chosen and rejected, and no prompt; name it prompt, question or instruction"
                )
            self.notes.converted.add("chosen and rejected -> a prompt and its two completions")
            prompt = chosen[: _common(chosen, rejected)]
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return [self._plain(prompt, text) for text in (chosen, rejected)]

    def _preference_of_messages(self, chosen: list[Message], rejected: list[Message]) -> list[Chat | Plain]:
        """Two replies to messages or prompt, or two whole conversations, whose common beginning is the prompt."""
        if not chosen or not rejected:
            raise ValueError("chosen or rejected has no messages")
        chat, prompt = self._one_of(_CHATS), self.fields.get("prompt")
        if chosen[0].is_answer != rejected[0].is_answer:
            raise ValueError("one of chosen and rejected begins with an answer, and the other one does not")
        if not chosen[0].is_answer:
            count = shared(chosen, rejected)
            if not count:
                raise ValueError("chosen and rejected do not begin with the same message")
            for name in (each for each in ("prompt", *_CHATS) if isinstance(self.fields.get(each), list)):
                given = read_messages(self.fields[name], name, Notes())
                if given != chosen[: len(given)]:
                    raise ValueError(f"{name} is not what chosen and rejected begin with; keep one of them")
            self.notes.converted.add("chosen and rejected -> messages and their two replies")
            return [self._reply(each[:count], each[count:]) for each in (chosen, rejected)]
        if (chat is None) == (prompt is None):
            raise self._no_form()
        self.notes.converted.add("chosen and rejected as messages -> replies")
        if isinstance(prompt, str):
            context = [_said("user", self._string("prompt"))]
        else:
            context = self._messages(chat or "prompt")
        return [self._reply(context, each) for each in (chosen, rejected)]

    # ---------------------------------------------------------------- their parts

    def _chat(self, messages: list[Message]) -> Chat:
        if name := self._one_of(_SYSTEM):
            messages = with_system(messages, self._string(name), name, self.notes)
        return Chat(messages, self._tools(), self._options())

    def _reply(self, context: Sequence[Message], reply: list[Message]) -> Chat:
        return self._chat([*(dataclasses.replace(each, learned=False) for each in context), *reply])

    def _plain(self, prompt: str, completion: str, may_be_cut: bool = False) -> Plain:
        for name in (*_SYSTEM, *_TOOLS, "chat_template_kwargs"):
            if self.fields.get(name):
                raise ValueError(f"{name} belongs to a chat, and this is plain text; write it as messages")
        return Plain(prompt, completion, may_be_cut)

    def _asked(self, name: str) -> list[Message]:
        """Turns before (`history`), and an instruction with its input as one message of the user."""
        text, more, history = self._string(name), self._one_of(_MORE), self.fields.get("history")
        if more and self._string(more).strip():
            text = f"{text}\n\n{self._string(more)}"
            self.notes.converted.add(f"{name} and {more} -> one message, with a blank line between")
        messages = []
        if history:
            self.used.add("history")
            self.notes.converted.add("history -> messages")
            turns = from_json(history, "history", self.notes)
            for turn in turns if isinstance(turns, list) else [turns]:
                if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(each, str) for each in turn):
                    raise ValueError("history is not a list of pairs of texts")
                messages += [_said("user", turn[0]), _said("assistant", turn[1])]
        return [*messages, _said("user", text)]

    def _messages(self, name: str) -> list[Message]:
        self.used.add(name)
        if name in _CHATS[1:]:
            self.notes.converted.add(f"{name} -> messages")
        return read_messages(self.fields[name], name, self.notes)

    def _string(self, name: str) -> str:
        self.used.add(name)
        if not isinstance(self.fields[name], str):
            raise ValueError(f"{name} is not a string but {type(self.fields[name]).__name__}")
        return self.fields[name]

    def _tools(self) -> list[Any] | None:
        name = self._one_of(tuple(each for each in _TOOLS if self.fields.get(each)))
        self.used |= set(_TOOLS)
        if name is None:
            return None
        tools = from_json(self.fields[name], name, self.notes)
        if not isinstance(tools, list):
            raise ValueError(f"{name} is not a list but {type(tools).__name__}")
        if name == "functions":
            self.notes.converted.add("functions -> tools")
            tools = [{"type": "function", "function": each} for each in tools]
        return tools or None

    def _options(self) -> dict[str, Any] | None:
        options = from_json(self.fields.get("chat_template_kwargs") or None, "chat_template_kwargs", self.notes)
        self.used.add("chat_template_kwargs")
        if not isinstance(options, dict | None):
            raise ValueError(f"chat_template_kwargs is not an object but {type(options).__name__}")
        return options

    def _one_of(self, names: Sequence[str]) -> str | None:
        found = [name for name in names if name in self.fields]
        if len(found) > 1:
            raise ValueError(f"it has both {' and '.join(found)}; keep one of them")
        return found[0] if found else None

    def _openai(self, fields: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's form of preferences has messages and tools in `input`, and two lists of messages."""
        asked, names = fields.get("input"), {"preferred_output": "chosen", "non_preferred_output": "rejected"}
        if not isinstance(asked, dict) or not names.keys() <= fields.keys():
            return fields
        self.notes.converted.add("input, preferred_output and non_preferred_output -> messages, chosen and rejected")
        return present(asked) | {names.get(key, key): value for key, value in fields.items() if key != "input"}

    def _refuse_what_would_get_lost(self) -> None:
        for name in _NOT_TEXT:
            if self.fields.get(name):
                raise ValueError(f"it has {name}, which this model cannot read; without the field, its text is learned")
        if self.fields.get("chat_template"):
            raise ValueError("it has a chat_template; the checkpoint's own is used, so remove the field")
        role = self.fields.get("role")
        if isinstance(role, str) and "text" in self.fields and role.lower() in _ROLES:
            raise ValueError(
                f"it is one message, of role {role}, and not a conversation; write each conversation as messages"
            )
        verdict = str(self.fields.get("label")).lower()  # a csv has it as text
        if verdict in ("true", "false", "0", "1", "0.0", "1.0") and {"completion", *_CHATS} & self.fields.keys():
            raise ValueError(
                "its label says whether the answer is wanted (KTO), which is not learned; keep the lines with true (1) "
                "and remove the field"
            )

    def _no_form(self) -> ValueError:
        names = [name[:40] for name in sorted(self.fields)][:20]  # a table's may be anything
        return ValueError(f"it has the fields {names}; method={self.method} needs {_NEEDED[self.method]}")


def _written_out(name: str, value: Any) -> Any:
    """Tables have messages as JSON text: in these fields a list of them is meant, and other text is text."""
    names = ("prompt", "completion", "chosen", "rejected")
    if not isinstance(value, str) or name not in names or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        found = decode(value)
    except (ValueError, RecursionError):
        if re.match(r"\s*\[\s*\{\s*'", value):
            raise ValueError(f"{name} is a list in Python's notation, not in JSON; write it with json.dumps") from None
        return value
    are_messages = all(isinstance(each, dict) and {"role", "from"} & each.keys() for each in found)
    return found if are_messages else value


def _said(role: str, text: str) -> Message:
    return Message({"role": role, "content": text}, role == "assistant")


def _common(one: str, other: str) -> int:
    """How many characters both begin with, up to the white space before the first word that differs.

    No token then has both sides of the border. Words before it that are learned though they are the same do no harm:
    their probabilities cancel in the difference of the two.
    """
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    while count and not one[count - 1].isspace():
        count -= 1
    return len(one[:count].rstrip())

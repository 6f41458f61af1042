"""Lists of messages as data sets have them -> messages with the keys that chat templates know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .json_array import decode

# Keys of messages that reach the chat template beside "role" and "content".
MORE_KEYS = ("tool_calls", "tool_call_id", "name", "tools", "reasoning_content")
# ShareGPT's names. Others stay as they are: whether the template knows them is checked where it is rendered.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_THOUGHTS = ("reasoning", "thinking")


@dataclasses.dataclass
class Notes:
    """What is to be said about a line: its fields that are not used, and what was converted to what."""

    unused: set[str] = dataclasses.field(default_factory=set)
    converted: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
      fields: "role" and "content" (None only beside tool_calls), and of MORE_KEYS those that it has.
      learned: whether it is an answer that is to be learned.
    """

    fields: dict[str, Any]
    learned: bool

    @property
    def is_answer(self) -> bool:
        """Whether an assistant says it."""
        return self.fields["role"] == "assistant"


def read_messages(value: Any, name: str, notes: Notes) -> list[Message]:
    """The messages of a field of a line: role and content, or ShareGPT's from and value; a list, one, or that as JSON.

    Raises:
      ValueError: it has another shape; names the message.
    """
    value = from_json(value, name, notes)
    if isinstance(value, dict):
        value = _columns(value, name, notes)
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list but {type(value).__name__}")
    return [_message(each, f"{name}[{index}]", name, notes) for index, each in enumerate(value)]


def _columns(value: dict[str, Any], name: str, notes: Notes) -> list[Any]:
    """One message as a list; or a list for each key, as `datasets` gives a sequence of objects -> the messages."""
    columns = present(value)
    if not isinstance(columns.get("role", columns.get("from")), list):
        return [value]
    if len({len(each) if isinstance(each, list) else -1 for each in columns.values()}) != 1:
        raise ValueError(f"{name} has lists of different lengths for its keys {sorted(columns)}")
    notes.converted.add(f"{name} as a list for each key -> messages")
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def from_json(value: Any, name: str, notes: Notes) -> Any:
    """Parses a string, as tables hold lists; anything else stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = decode(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is a text that is not JSON ({error}); write it with json.dumps") from None
    notes.converted.add(f"{name} from JSON in a text")
    return parsed


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """Without nulls: tables fill absent fields with them."""
    return {name: value for name, value in fields.items() if value is not None}


def _message(value: Any, place: str, name: str, notes: Notes) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f'{place} is {value!r}; write {{"role": ..., "content": ...}}')
    fields = present(value)
    if "from" in fields and "role" not in fields and "content" not in fields:
        fields = {{"from": "role", "value": "content"}.get(key, key): each for key, each in fields.items()}
        notes.converted.add("from and value -> role and content")
    role = fields.get("role")
    if not isinstance(role, str):
        raise ValueError(f'{place} is {value!r}, without a role; write {{"role": ..., "content": ...}}')
    known = role.lower() if role.lower() in ("user", "assistant", "system", "tool") else role
    fields["role"] = _ROLES.get(role.lower(), known)
    if fields["role"] != role:
        notes.converted.add(f"role {role} -> {fields['role']}")
    if {"function_call", "tool_calls"} <= fields.keys():
        raise ValueError(f"{place} has both function_call and tool_calls; keep one of them")
    if role.lower() == "function_call":
        fields |= {"tool_calls": [_call(fields.pop("content", None), place)]}
    if call := fields.pop("function_call", None):
        fields["tool_calls"] = [_call(call, place)]
        notes.converted.add("function_call -> tool_calls")
    for key in _THOUGHTS:
        if fields.get(key) and "reasoning_content" not in fields:
            fields["reasoning_content"] = fields.pop(key)
            notes.converted.add(f"{key} -> reasoning_content")
    learned = _is_learned(fields, place)
    kept = {"role": fields["role"], "content": _content(fields, place, notes)}
    kept |= {key: fields[key] for key in MORE_KEYS if fields.get(key)}
    notes.unused |= {f"{name}[].{key}" for key in fields.keys() - kept.keys() - {"weight", *MORE_KEYS}}
    return Message(kept, learned)


def _content(fields: dict[str, Any], place: str, notes: Notes) -> str | None:
    content = fields.get("content")
    if content is None and fields.get("tool_calls"):
        return None
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{place}: a part of its content is not text but {kind}, which the model cannot read")
            texts.append(part["text"])
        notes.converted.add("content in parts -> one text, with line breaks between parts")
        return "\n".join(texts)
    if not isinstance(content, str):
        raise ValueError(
            f"{place}: its content is not a string but {'null' if content is None else type(content).__name__}"
        )
    return content


def _is_learned(fields: dict[str, Any], place: str) -> bool:
    """OpenAI's weight: an answer with 0 is context only."""
    is_answer = fields["role"] == "assistant"
    weight = fields.get("weight", 1 if is_answer else 0)
    if weight not in (0, 1) or (weight and not is_answer):
        raise ValueError(f"{place}: weight is {weight!r}; answers may have 0 (not learned) or 1, other messages only 0")
    return bool(weight)


def _call(value: Any, place: str) -> dict[str, Any]:
    """A call of a function as {"name", "arguments"}, or that as JSON -> as in tool_calls."""
    try:
        function = decode(value) if isinstance(value, str) else value
        return {"type": "function", "function": {"name": function["name"], "arguments": function["arguments"]}}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f'{place}: its call is not {{"name": ..., "arguments": ...}}') from None


def with_system(messages: list[Message], system: str, name: str, notes: Notes) -> list[Message]:
    """The messages with the system message that stands in a field of its own.

    Raises:
      ValueError: they begin with another one.
    """
    if not system.strip():
        return messages
    if messages and messages[0].fields["role"] == "system":
        if messages[0].fields["content"] != system:
            raise ValueError(f"{name} says something else than the system message; keep one of them")
        return messages
    notes.converted.add(f"{name} -> a system message")
    return [Message({"role": "system", "content": system}, False), *messages]


def shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """With how many equal messages both begin; at least the last of each is its own."""
    count = 0
    for left, right in zip(one[:-1], other[:-1], strict=False):
        if left.fields != right.fields:
            break
        count += 1
    return count

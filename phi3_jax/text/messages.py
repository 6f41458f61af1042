"""What a chat template is given: messages, tools and options, checked and copied as plain data."""

import dataclasses
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from phi3_jax.text.templates.template import vocabulary
from phi3_jax.text.tokenizer import Tokenizer

MOST_NESTED = 100  # lists and dicts inside of one another, which many functions walk through by calling themselves
Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_SHAPE = (
    'pass a list of {"role": str, "content": str}, with "tool_calls", "tool_call_id" or "name" where tools are used'
)
_FIELDS = frozenset(["role", "content", "tool_calls", "tool_call_id", "name", "tools", "reasoning_content"])
_RESERVED = frozenset(["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "now"])
_CALL, _END_CALL = "<|tool_call|>", "<|/tool_call|>"  # of Phi-4-mini


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages, tools (None: there are none) and further variables for the template: JSON's types only."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    options: dict[str, Any]
    now: datetime = dataclasses.field(default_factory=datetime.now)  # the same whenever the chat is rendered

    def texts(self) -> Iterator[str]:
        """Every text in it."""
        return texts_of([self.messages, self.tools, self.options])


def read_chat(
    messages: Sequence[Message], tools: Sequence[Tool] | None = None, options: Mapping[str, Any] | None = None
) -> Chat:
    """Checks and copies. Raises ValueError for data of another shape."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is a {type(messages).__name__}; {_SHAPE}.")
    if not messages:
        raise ValueError(f"messages is empty; {_SHAPE}.")
    options = {} if options is None else dict(options)
    if reserved := sorted(_RESERVED & options.keys()):
        raise ValueError(f"template_options has {reserved}, which are not for it to set; pass them as arguments.")
    return Chat(
        [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
        None if tools is None else read_tools(tools),
        {str(key): plain(value, f"template_options[{key!r}]") for key, value in options.items()},
    )


def read_tools(tools: Sequence[Tool], name: str = "tools") -> list[Any]:
    """Definitions of functions, checked and copied.

    Each is {"type": "function", "function": {"name": str, "description": str, "parameters": a JSON schema}}, or only
    the inner dict. Raises ValueError for others.
    """
    shape = 'pass a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}.'
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"{name} is a {type(tools).__name__}; {shape}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(function_of(tool).get("name"), str):
            raise ValueError(f"{name}[{index}] is {_short(tool)}, with no name of a function in it; {shape}")
    return [plain(tool, f"{name}[{index}]") for index, tool in enumerate(tools)]


def function_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The {"name": ...} of a tool or of a call, which may stand below "function"."""
    inner = entry.get("function")
    return inner if isinstance(inner, Mapping) else entry


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a call; those written as JSON's text, as OpenAI does, are read."""
    arguments = function_of(call).get("arguments", {})
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def plain(value: Any, name: str) -> Any:
    """A copy that consists of JSON's types. Raises ValueError, with the place, for others, and for what is too deep."""
    try:
        return _plain(value, name, MOST_NESTED)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply (more than {MOST_NESTED} times), or holds itself") from None


def texts_of(value: Any) -> Iterator[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from texts_of(each)


def variables(
    tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What the template sees: the chat, with tools where this template reads them.

    Phi-4-mini's knows no `tools`; it reads them as JSON text from the system message. And it writes no `tool_calls`:
    then they become a part of the content, in the form that the model itself writes, if the tokenizer has the markers.

    Returns:
        the names that the template may use, and "contents": where in these are such markers, as [message, begin, end].
    """
    speaks = vocabulary(tokenizer)
    messages, tools = [_aliased(message) for message in chat.messages], chat.tools
    markers: list[Any] = []
    in_messages = "tools" in speaks.fields and "tools" not in speaks.variables
    if tools and in_messages:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        if messages[0].get("tools") is None:
            messages[0]["tools"] = tools
    if in_messages and not speaks.writes_json:
        for message in messages:
            if isinstance(message.get("tools"), list):
                message["tools"] = json.dumps([function_of(tool) for tool in message["tools"]], ensure_ascii=False)
    if in_messages and "tool_calls" not in speaks.fields and {_CALL, _END_CALL} <= set(tokenizer.pieces):
        for index, message in enumerate(messages):
            if calls := message.pop("tool_calls", None):
                calls = [{"name": function_of(call)["name"], "arguments": arguments_of(call)} for call in calls]
                said = f"{message.get('content') or ''}{_CALL}{json.dumps(calls, ensure_ascii=False)}{_END_CALL}"
                begin = len(message.get("content") or "")
                markers += [[index, begin, begin + len(_CALL)], [index, len(said) - len(_END_CALL), len(said)]]
                message["content"] = said
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
    return {"documents": None} | chat.options | given | {"now": chat.now.isoformat()}, {"contents": markers}


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A copy; some templates call reasoning_content by another name."""
    reasoning = message.get("reasoning_content")
    return dict(message) if reasoning is None else {"thinking": reasoning, **message}


def _read_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"{name} is {_short(message)}; {_SHAPE}.")
    # What holds nothing loses nothing: clients write "refusal": null and "annotations": [].
    message = {key: value for key, value in message.items() if key in _FIELDS or value not in (None, [], {}, "")}
    if unknown := sorted(map(str, message.keys() - _FIELDS)):
        raise ValueError(f"{name} has the unknown fields {unknown}; there are {sorted(_FIELDS)}.")
    calls = message.get("tool_calls")
    wanted: dict[str, tuple[type, ...]] = {"role": (str,), "content": (str,), "tools": (str, list, tuple)}
    for key, value in message.items():
        optional = key not in wanted or key == "tools" or (key == "content" and calls)
        if key != "tool_calls" and not isinstance(value, wanted.get(key, (str,))) and not (optional and value is None):
            raise ValueError(f"{name}[{key!r}] is a {type(value).__name__}; {_SHAPE}.")
    if not _is_name(message["role"]):
        raise ValueError(
            f"{name}['role'] is {_short(message['role'])}, which is no name (letters, digits, '_', '-', '.'); use "
            "one that the template knows, such as 'user'."
        )
    if "content" not in message and not calls:
        raise ValueError(f"{name} is {_short(message)}; {_SHAPE}.")
    if isinstance(message.get("tools"), list | tuple):
        read_tools(message["tools"], f"{name}['tools']")
    if calls is not None:
        _check_calls(calls, f"{name}['tool_calls']")
    return {str(key): plain(value, f"{name}[{key!r}]") for key, value in message.items()}


def _is_name(role: str) -> bool:
    """Letters and digits of any script, and single spaces inside."""
    letters = all(c in "_-. " or unicodedata.category(c)[0] in "LMN" for c in role)
    return bool(role) and letters and role == " ".join(role.split())


def _check_calls(calls: Any, name: str) -> None:
    shape = 'pass a list of {"function": {"name": str, "arguments": {...}}}.'
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{name} is a {type(calls).__name__}; {shape}")
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping) or not isinstance(function_of(call).get("name"), str):
            raise ValueError(f"{name}[{index}] is {_short(call)}, with no name of a function in it; {shape}")


def _plain(value: Any, name: str, room: int) -> Any:
    if not room:
        raise RecursionError
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(each, f"{name}[{index}]", room - 1) for index, each in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): _plain(each, f"{name}[{key!r}]", room - 1) for key, each in value.items()}
    raise ValueError(f"{name} is {_short(value)}, which is not JSON; pass text, numbers, lists and dicts.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

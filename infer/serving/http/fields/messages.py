"""Conversations as OpenAI writes them, and the functions that an answer may call, as `encode_chat` takes them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from phi3_jax.json_files import parse
from phi3_jax.text import call_schema

from ....sampling import Grammar
from ..errors import invalid
from .formats import check_schema
from .values import Fields, attempt

MOST_CALLS = 16  # of an answer that has to call; small models go on for long
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """What an answer may call.

    Attributes:
      shown: the functions that the model is told of; None: it is told of none.
      grammar: what an answer that has to call matches.
      most: calls of an answer.
    """

    shown: list[Any] | None = None
    grammar: Grammar | None = None
    most: int | None = None


def read_messages(fields: Fields, most: int) -> list[dict[str, Any]]:
    """The messages of a conversation, as `encode_chat` takes them. Raises ApiError (400)."""
    given = fields.items("messages", most) or []
    if not given:
        raise invalid("messages is empty: give at least one", "messages")
    messages, names = [], dict[str, str]()
    for index, each in enumerate(given):
        message = _read_message(Fields(each, f"messages[{index}]"))
        for call in message.get("tool_calls", []):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and (name := names.get(message.get("tool_call_id", ""))) is not None:
            message.setdefault("name", name)  # some templates write it
        messages.append(message)
    return messages


def _read_message(fields: Fields) -> dict[str, Any]:
    fields.required("role")
    role = _ROLES[fields.one_of("role", _ROLES, "")]
    message: dict[str, Any] = {"role": role}
    if calls := fields.items("tool_calls", MOST_CALLS * 8):
        place = fields.name("tool_calls")
        message["tool_calls"] = [_read_call(Fields(call, f"{place}[{i}]")) for i, call in enumerate(calls)]
    content = fields.get("content")
    if (parts := fields.parts("content")) is not None:
        content = "".join(map(_read_part, parts))
    elif content is not None and not isinstance(content, str):
        raise fields.wrong("content", "a text, or a list of parts")
    if content is None and not calls and role != "assistant":
        fields.required("content")
    message["content"] = content or ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := fields.text(name, None)) is not None:
            message[name] = value
    fields.refuse_others(("refusal", "annotations"))
    return message


def _read_part(fields: Fields) -> str:
    if (kind := fields.text("type", "text")) != "text":
        name = fields.name("type")
        raise invalid(f"{name}={kind[:40]!r}: this model reads only text", name, "unsupported_value")
    fields.required("text")
    return fields.text("text", "")


def _read_call(fields: Fields) -> dict[str, Any]:
    """A call of an earlier answer. Its arguments come as a JSON text; templates want the object."""
    fields.only("type", "function")
    function = Fields(fields.required("function"), fields.name("function"))
    name, arguments = function.text("name", ""), function.get("arguments")
    if isinstance(arguments, str):
        text = arguments or "{}"
        arguments = attempt(lambda: parse(text), function.name("arguments"))
    if not isinstance(arguments := {} if arguments is None else arguments, dict):
        raise function.wrong("arguments", "an object, as a JSON text")
    return {"id": fields.text("id", ""), "type": "function", "function": {"name": name, "arguments": arguments}}


def read_template_options(fields: Fields) -> dict[str, Any] | None:
    """Further variables for the chat template, such as {"enable_thinking": false}."""
    options = fields.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise fields.wrong("chat_template_kwargs", "an object")
    return options


def read_tool_use(fields: Fields, most: int) -> ToolUse:
    """tools, tool_choice and parallel_tool_calls. Raises ApiError (400)."""
    given = fields.items("tools", most) or []
    tools = [_read_tool(Fields(tool, f"tools[{index}]")) for index, tool in enumerate(given)]
    if tools:
        check_schema({"tools": tools}, "tools")
    parallel, choice = fields.truth("parallel_tool_calls", True), fields.get("tool_choice")
    most_calls = None if parallel else 1
    if choice == "none" or (choice in (None, "auto") and not tools):
        return ToolUse()
    if not tools:
        raise invalid("tool_choice needs tools", "tool_choice")
    if choice in (None, "auto"):
        return ToolUse(tools, most=most_calls)
    called = tools
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice")
        inner.only("type", "function")
        name = Fields(inner.required("function"), "tool_choice.function").text("name", "")
        called, most_calls = [tool for tool in tools if tool["function"]["name"] == name], 1
        if not called:
            raise invalid(f"tool_choice: there is no function {name[:80]!r} among the tools", "tool_choice")
    elif choice != "required":
        raise fields.wrong("tool_choice", '"none", "auto", "required" or {"type": "function", "function": ...}')
    schema = attempt(lambda: call_schema(called, most_calls or MOST_CALLS), "tools")
    return ToolUse(tools, attempt(lambda: Grammar.json_schema(schema), "tools"), most_calls)


def _read_tool(fields: Fields) -> dict[str, Any]:
    fields.only("type", "function")
    function = Fields(fields.required("function"), fields.name("function"))
    name = function.text("name", "")
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise function.wrong("name", "of at most 64 letters, digits, _, - and .")
    tool: dict[str, Any] = {"name": name}
    if (description := function.text("description", None)) is not None:
        tool["description"] = description
    if (parameters := function.get("parameters")) is not None:
        check_schema(parameters, function.name("parameters"))
        tool["parameters"] = parameters
    function.truth("strict", False)
    function.refuse_others()
    return {"type": "function", "function": tool}

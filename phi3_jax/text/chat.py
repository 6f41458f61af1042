"""Messages -> prompt, with the checkpoint's chat template.

    messages, tools -> messages.py: checked -> templates/template.py: text, also in colours of whose word it is
                    -> templates/literals.py: special tokens that are not the template's are marked -> ids

What a message says is text: a `<|end|>` in it stays plain text and never ends the turn, whatever the template does with
it. The same holds for the descriptions of tools, the arguments of calls and template options. Roles are names.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.text.messages import Chat, Message, Tool, function_of, read_chat
from phi3_jax.text.templates.literals import judge, unused_noncharacter, write
from phi3_jax.text.templates.template import for_chat, vocabulary
from phi3_jax.text.tokenizer import Tokenizer


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the checkpoint's template writes it.

    Args:
        messages: dicts with "role" and "content", both strings. There may also be "tool_calls" (a list of
            {"function": {"name": ..., "arguments": {...}}}; content may then be None), "tool_call_id", "name",
            "reasoning_content", and "tools", which Phi-4-mini's template reads from the system message: JSON's text, or
            a list that becomes such a text.
        add_generation_prompt: end with the header of the assistant's next turn.
        tools: functions that the model may call, as {"type": "function", "function": {"name": ..., "description": ...,
            "parameters": a JSON schema}}. A template that reads them from the system message gets them there.
        template_options: further variables that the template reads, such as {"enable_thinking": False}.

    Raises:
        ValueError: messages or tools of another shape, no template, a template that fails or refuses the messages, or
            one that makes a control token out of a role that it does not know.

    Warns:
        UserWarning: the template drops a message, for example because it does not know the role; or tools, calls,
            reasoning or a name.
    """
    chat = read_chat(messages, tools, template_options)
    tokenizer = for_chat(tokenizer, tools is not None)
    text = judge(tokenizer, chat, add_generation_prompt).text
    _warn_of_dropped(tokenizer, chat, add_generation_prompt)
    return text


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] | None = None,
    template_options: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> list[int]:
    """Token ids of the rendered conversation. Arguments, errors and warnings as in `render_chat`.

    `most` is as in `Tokenizer.encode`.

    Special tokens written by the template become their ids; the same strings in messages and tools stay text, encoded
    in their place, so that the text around them gets its usual ids. bos is there only if the template writes it.
    """
    chat = read_chat(messages, tools, template_options)
    tokenizer = for_chat(tokenizer, tools is not None)
    written = judge(tokenizer, chat, add_generation_prompt)
    _warn_of_dropped(tokenizer, chat, add_generation_prompt)
    mark = unused_noncharacter(tokenizer, chat, written.text)
    return tokenizer.encode(written.marked(mark), parse_special=True, add_bos=False, literal_mark=mark, most=most)


def _warn_of_dropped(tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool) -> None:
    for text in dropped(tokenizer, chat, add_generation_prompt):
        warnings.warn(text, UserWarning, stacklevel=3)


def dropped(tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool) -> list[str]:
    """Says of each part of the chat that the template does not write what to do instead."""
    # Searching for the content is not enough: another message may have the same.
    probe = unused_noncharacter(tokenizer, chat)
    probed, parts = _probed(chat, probe, functions=True)
    try:
        text = write(tokenizer, probed, add_generation_prompt)
    except ValueError:  # a template may refuse to call a function that is none of the tools
        probed, parts = _probed(chat, probe, functions=False)
        text = write(tokenizer, probed, add_generation_prompt)
    found = [part for index, part in enumerate(parts) if f"{probe}{index}{probe}" not in text]
    if not {"reasoning_content", "thinking"} & vocabulary(tokenizer).fields:
        # A template that knows it leaves out that of earlier turns on purpose.
        thoughts = [index for index, message in enumerate(chat.messages) if message.get("reasoning_content")]
        found += [(f"the reasoning_content of messages[{index}]", "put it into the content.") for index in thoughts]
    said = [f"{tokenizer.source}: the checkpoint's chat template drops {what}; {remedy}" for what, remedy in found]
    return list(dict.fromkeys(said))


def _probed(chat: Chat, probe: str, functions: bool) -> tuple[Chat, list[tuple[str, str]]]:
    """The chat with a mark in each part, in the names of functions only if asked; what the parts are, and remedies."""
    parts: list[tuple[str, str]] = []

    def mark(what: str, remedy: str) -> str:
        parts.append((what, remedy))
        return f"{probe}{len(parts) - 1}{probe}"

    messages, tools = [dict(message) for message in chat.messages], chat.tools
    for index, message in enumerate(messages):
        role, calls, name = message["role"], message.get("tool_calls"), f"messages[{index}]"
        if calls and message.get("content"):
            message["content"] += mark(f"the content beside the tool calls of {name}", _BESIDE)
        elif (message.get("content") or "").strip() and not calls:
            which = "the system message" if role == "system" else name
            if message is messages[-1] and role == "assistant" and "</think>" in message["content"]:
                # Those of earlier turns are left out on purpose.
                end = mark(f"the thoughts of {name}", "leave them out, or use a template that writes them.")
                message["content"] = message["content"].replace("</think>", f"{end}</think>", 1)
            message["content"] += mark(f"{which}, of role {role!r}", _OTHER_ROLE)
        if calls and functions:
            message["tool_calls"] = [_renamed(call, mark(f"the tool calls of {name}", _CALLS)) for call in calls]
        if (given := message.get("tools")) and functions:
            end = mark(f"the tools of {name}", _TOOLS)
            message["tools"] = given + end if isinstance(given, str) else [_renamed(given[0], end), *given[1:]]
        if message.get("name") and role not in ("tool", "function", "ipython"):  # a result has its call's name
            message["name"] += mark(f"the name in {name}", "put it into the content.")
    if tools and functions:
        tools = [_renamed(tool, mark(f"tools[{index}]", _TOOLS)) for index, tool in enumerate(tools)]
    return dataclasses.replace(chat, messages=messages, tools=tools), parts


_OTHER_ROLE = "put its text into a message of the user, or use a role that the template knows."
_BESIDE = "leave it out, or use a template that writes both."
_TOOLS = "describe them in the system message, or use a template that knows tools."
_CALLS = "write them into the content, or use a template that knows tool_calls."


def _renamed(entry: Any, mark: str) -> Any:
    """A tool or a call, with the mark behind the name of its function."""
    function = function_of(entry)
    renamed = {**function, "name": function["name"] + mark}
    return {**entry, "function": renamed} if function is not entry else renamed

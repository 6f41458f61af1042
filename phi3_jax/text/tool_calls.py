"""An answer -> what it says, and the functions that it calls.

    ids --MarkerDecoder--> text with <|tool_call|> and its like --ToolCallParser--> content and calls

Models write calls in many forms, all of them JSON:

    <|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>     Phi-4-mini; the end may be missing
    functools[{"name": ..., "arguments": {...}}]                       Phi-4-mini, with the prompt that others give it
    <tool_call>{"name": ..., "arguments": {...}}</tool_call>           Hermes, Qwen
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]                   Mistral; also [TOOL_CALLS]name[ARGS]{...}
    <function=name>{...}</function>                                    Llama 3
    <|python_tag|>{"name": ..., "parameters": {...}}                   Llama 3
    {"name": ..., "parameters": {...}} and [...], also in ```          nothing else in the answer; Llama 3, Phi-4
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from phi3_jax.text.messages import Tool, function_of, read_tools
from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer

# What opens a call, and what closes it, where it is written.
_MARKERS = {
    "<|tool_call|>": ("<|/tool_call|>", "</|tool_call|>"),
    "<tool_call>": ("</tool_call>",),
    "[TOOL_CALLS]": ("[/TOOL_CALLS]",),
    "<|python_tag|>": (),
    "<function=": ("</function>",),
    "functools[": (),
}
_ALL_MARKERS = frozenset([*_MARKERS, *(end for ends in _MARKERS.values() for end in ends), "[ARGS]"])
_OPENING = re.compile("|".join(map(re.escape, _MARKERS)))
# Markers behind which a name may stand, apart from the arguments: the whole of it, and its beginnings.
_NAMED = {
    "[TOOL_CALLS]": (
        re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\[ARGS\]\s*)?(?=\{)"),
        re.compile(r"\s*([A-Za-z_][\w.-]*)?\s*(\[(A(R(G(S(\]\s*)?)?)?)?)?)?"),
    ),
    "<function=": (re.compile(r"([A-Za-z_][\w.-]*)>\s*(?=\{)"), re.compile(r"([A-Za-z_][\w.-]*(>\s*)?)?")),
}
# The beginning of an answer that may be nothing but calls: its first key, or what there is of it so far.
_BARE = re.compile(r'\s*(```(json)?\s*)?[\[\s]*\{\s*"(name|type|function|id|arguments|parameters)"')
_BARE_BEGUN = re.compile(r'\s*(`{1,2}|```(j|js|jso|json)?\s*)?(\[[\[\s]*)?(\{\s*("\w*)?)?')
_JSON_TOKEN = re.compile(r'[\[\]{}]|"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[^\s\[\]{}"]+', re.DOTALL)
_FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that an answer calls."""

    name: str
    arguments: dict[str, Any]

    def as_message_part(self, call_id: str) -> dict[str, Any]:
        """As it stands in the "tool_calls" of a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": call_id, "type": "function", "function": function}


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer, read.

    Attributes:
        content: what it says beside the calls.
        calls: in their order.
        problems: what looked like a call and is none, so that it stays in the content; one line each.
    """

    content: str
    calls: list[ToolCall]
    problems: list[str]


def parse_tool_calls(
    answer: str | Sequence[int], tokenizer: Tokenizer | None = None, *, tools: Sequence[Tool] | None = None
) -> Reply:
    """Reads the calls in an answer.

    Args:
        answer: its token ids, or its text. Text that was decoded without special tokens may have lost the markers.
        tokenizer: for token ids.
        tools: an answer that is only JSON is a call if it names one of these; None: whatever it names.

    Raises:
        ValueError: token ids without a tokenizer.
    """
    parser = ToolCallParser(tools)
    if isinstance(answer, str):
        content = parser.push(answer)
    elif tokenizer is None:
        raise ValueError("token ids need the tokenizer: parse_tool_calls(ids, checkpoint.tokenizer)")
    else:
        decoder = MarkerDecoder(tokenizer)
        content = "".join(parser.push(decoder.push(token)) for token in answer) + parser.push(decoder.flush())
    return Reply((content + parser.flush()).strip(), parser.calls, parser.problems)


class MarkerDecoder(StreamDecoder):
    """As `Tokenizer.stream(skip_special_tokens=True)`, but special tokens that mark calls are written out."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self._skip -= {token.id for token in tokenizer.added_tokens if token.content in _ALL_MARKERS}


class ToolCallParser:
    """Reads an answer piece by piece. However it is cut, the contents, joined, and the calls are the same.

    Attributes:
        calls, problems: as in `Reply`, so far.
    """

    def __init__(self, tools: Sequence[Tool] | None = None):
        self._names = None if tools is None else {function_of(tool)["name"] for tool in read_tools(tools)}
        self._text = ""  # not decided yet
        self._is_first = True  # nothing is decided yet
        self._needs_bracket = False  # the text ends inside of JSON
        self.calls: list[ToolCall] = []
        self.problems: list[str] = []

    def push(self, text: str) -> str:
        """Adds text -> the content that is now certain."""
        self._text += text
        if self._needs_bracket and not {"]", "}"} & set(text):
            return ""
        return self._read(is_over=False)

    def flush(self) -> str:
        """The content held back so far; the answer is over."""
        return self._read(is_over=True)

    def _read(self, is_over: bool) -> str:
        content = ""
        if self._is_first:
            if not is_over and (_BARE.match(self._text) or _BARE_BEGUN.fullmatch(self._text)):
                return ""
            self._is_first = False
            if is_over and self._read_bare():
                return ""
        while (opening := _OPENING.search(self._text)) is not None:
            content += self._text[: opening.start()]
            self._text = self._text[opening.start() :]
            try:
                end, calls = _read_marked(self._text, opening[0], is_over)
            except _IncompleteError as error:
                self._needs_bracket = error.inside_json
                return content
            except ValueError as error:
                self._complain(f"what follows {opening[0]}", error)
                end, calls = len(opening[0]), []
                content += opening[0]
            self.calls += calls
            self._text = self._text[end:]
        self._needs_bracket = False
        held = 0 if is_over else _begun(self._text, _MARKERS)
        content += self._text[: len(self._text) - held]
        self._text = self._text[len(self._text) - held :]
        return content

    def _read_bare(self) -> bool:
        """Takes the whole text, if it is nothing but calls."""
        if not _BARE.match(self._text):
            return False
        fenced = _FENCED.fullmatch(self._text)
        text = fenced[1] if fenced else self._text.strip()
        try:
            end, values = _read_values(text, 0, (), is_over=True)
            if text[end:].strip(" \n\t;,"):
                raise ValueError("more than calls")
            calls = _calls(values, strict=True)
        except ValueError as error:
            if '"name"' in text and ('"arguments"' in text or '"parameters"' in text):
                self._complain("the answer", error)
            return False
        if self._names is not None and (unknown := {call.name for call in calls} - self._names):
            self._complain("the answer", ValueError(f"no tool is called {' or '.join(sorted(unknown))}"))
            return False
        self.calls += calls
        self._text = ""
        return True

    def _complain(self, what: str, error: ValueError) -> None:
        self.problems.append(f"{what} is no tool call, and stays in the text: {error}")


class _IncompleteError(Exception):
    """More text is needed; with `inside_json`, a closing bracket is in it."""

    def __init__(self, inside_json: bool = False):
        super().__init__()
        self.inside_json = inside_json


def _read_marked(text: str, opening: str, is_over: bool) -> tuple[int, list[ToolCall]]:
    """The calls behind a marker, and where they end. Raises ValueError for anything else."""
    start = len(opening) - opening.endswith("[")  # the bracket of functools[ is a part of its list
    if opening in _NAMED:
        whole, begun = _NAMED[opening]
        if named := whole.match(text, start):
            end, arguments = _read_values(text, named.end(), _MARKERS[opening], is_over)
            return end, [_call({"name": named[1], "arguments": value}) for value in arguments]
        if not is_over and begun.fullmatch(text, start):
            raise _IncompleteError
    end, values = _read_values(text, start, _MARKERS[opening], is_over)
    return end, _calls(values)


def _read_values(text: str, start: int, closings: Iterable[str], is_over: bool) -> tuple[int, list[Any]]:
    """One JSON value after the other, and where they end, the closing marker included."""
    end, value = _read_json(text, start, is_over)
    values = [value]
    while True:
        rest = text[end:]
        follows = rest.lstrip()
        for closing in closings:
            if follows.startswith(closing):
                return len(text) - len(follows) + len(closing), values
            if closing.startswith(follows) and not is_over:
                raise _IncompleteError
        next_value = re.match(r"\s*[,;]?\s*(\{|\[\s*\{|(\[\s*)?\Z)", rest)
        is_there = next_value is not None and next_value[1].endswith("{")
        if next_value is None or (is_over and not is_there):
            return end, values
        if not is_there:
            raise _IncompleteError
        end, value = _read_json(text, end + next_value.start(1), is_over)
        values.append(value)


def _read_json(text: str, start: int, is_over: bool) -> tuple[int, Any]:
    """A JSON object or array, and where it ends."""
    open_brackets: list[str] = []
    for match in _JSON_TOKEN.finditer(text, start):
        token = match[0]
        if token in "[{":
            open_brackets.append("]" if token == "[" else "}")
        elif not open_brackets:
            raise ValueError(f"JSON begins with a bracket, not with {token[0]!r}")
        elif token in "]}":
            if open_brackets.pop() != token:
                raise ValueError(f"a {token} too many")
            if not open_brackets:
                return match.end(), _loads(text[start : match.end()])
    if is_over:
        raise ValueError("it ends in the middle")
    raise _IncompleteError(inside_json=bool(open_brackets))


def _loads(text: str) -> Any:
    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):  # 1e999 as well
            raise ValueError(f"{number} is not JSON")
        return value

    try:
        value = json.loads(text, parse_constant=finite, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _calls(values: list[Any], strict: bool = False) -> list[ToolCall]:
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return [_call(entry, strict) for entry in entries]


def _call(entry: Any, strict: bool = False) -> ToolCall:
    """What one object says. Without `strict`, a call may have no arguments."""
    function = function_of(entry) if isinstance(entry, dict) else {}
    name = function.get("name")
    if not isinstance(name, str):
        raise ValueError(f"no name of a function in {json.dumps(entry, ensure_ascii=False)[:40]}")
    found = [each["arguments"] for each in (function, entry) if "arguments" in each]
    if not found and not strict and (odd := function.keys() - {"name", "type", "id", "parameters", "description"}):
        raise ValueError(f"no arguments for {name}, but {', '.join(sorted(map(repr, odd)))}")
    if not found and "description" not in function:  # else it is the tool's definition, whose parameters are a schema
        found = [function["parameters"]] if "parameters" in function else []
        found = found or ([] if strict else [{}])
    if not found:
        raise ValueError(f"no arguments for {name}")
    arguments = {} if found[0] in (None, "") else found[0]
    arguments = _loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments for {name} are no object")
    return ToolCall(name, arguments)


def _begun(text: str, markers: Iterable[str]) -> int:
    """The length of the end of a text with which a marker may begin."""
    longest = max(map(len, markers)) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(marker.startswith(text[-n:]) for marker in markers)), 0)

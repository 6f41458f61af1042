"""Answers with calls: every form in which models write them, in one piece and in any pieces."""

import pytest
from chat_templates import TIME, WEATHER, write_tokenizer

from phi3_jax.text import ToolCall, ToolCallParser, load_tokenizer, parse_tool_calls

A = '{"name": "get_weather", "arguments": {"city": "Orl\\u00e9ans \\"[{", "days": [1, {"x": null}]}}'
B = '{"name": "time", "arguments": {}}'
CALL_A = ToolCall("get_weather", {"city": 'Orléans "[{', "days": [1, {"x": None}]})
CALL_B = ToolCall("time", {})
PARAMETERS = A.replace("arguments", "parameters")

# Forms as they are published or were seen, the content that stays, and the calls.
CALLS: list[tuple[str, str, list[ToolCall]]] = [
    (f"<|tool_call|>[{A}, {B}]<|/tool_call|>", "", [CALL_A, CALL_B]),
    (f"Let me look.\n<|tool_call|>[{A}]", "Let me look.", [CALL_A]),
    (f"<|tool_call|>{A}, {B}<|/tool_call|> Done.", "Done.", [CALL_A, CALL_B]),
    (f'<|tool_call|>[{{"type": "function", "function": {A}}}]</|tool_call|>', "", [CALL_A]),
    (
        '<|tool_call|>[{"type": "function", "function": {"name": "time", "parameters": {}}, "arguments": {}}]',
        "",
        [CALL_B],
    ),
    ('<|tool_call|>[{"name": "time", "arguments": "{\\"zone\\": 1}"}]', "", [ToolCall("time", {"zone": 1})]),
    (f"functools[{A}, {B}]", "", [CALL_A, CALL_B]),
    (f"I call functools [{B}] with functools[{B}]", f"I call functools [{B}] with", [CALL_B]),
    (f"<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>", "", [CALL_A, CALL_B]),
    (f"Hm </tool_call> <tool\n<tool_call>{B}</tool_call>!", "Hm </tool_call> <tool\n!", [CALL_B]),
    (f"[TOOL_CALLS] [{A}]", "", [CALL_A]),
    (f"x[TOOL_CALLS][{A}, {B}] y", "x y", [CALL_A, CALL_B]),
    ('[TOOL_CALLS]time[ARGS]{"zone": 1}[TOOL_CALLS]time{}', "", [ToolCall("time", {"zone": 1}), CALL_B]),
    (f"<|python_tag|>{PARAMETERS}", "", [CALL_A]),
    ('<function=time>{"zone": 1}</function><function=time>{}', "", [ToolCall("time", {"zone": 1}), CALL_B]),
    ("[TOOL_CALLS]time{} and so on", "and so on", [CALL_B]),
    (PARAMETERS, "", [CALL_A]),
    (f" {A};\n{B}\n", "", [CALL_A, CALL_B]),
    (f"[{A}, {B}]", "", [CALL_A, CALL_B]),
    (f"```json\n[{A}]\n```", "", [CALL_A]),
    (f"```\n{B}\n```\n", "", [CALL_B]),
    # no calls
    ("", "", []),
    ("It is 21 °C < 30 °C. [sic", "It is 21 °C < 30 °C. [sic", []),
    ('{"city": "Paris"}', '{"city": "Paris"}', []),
    ('{"name": "Paris", "age": 3}', '{"name": "Paris", "age": 3}', []),
    ("```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    ("[1, 2]", "[1, 2]", []),
    ("[TOOL_CALL", "[TOOL_CALL", []),
]
# What looks like a call and is none stays in the content, and is said.
MALFORMED: list[tuple[str, str]] = [
    ("<|tool_call|>[{'name': 'time'}]<|/tool_call|>", "not JSON: Expecting property name"),
    (f"<|tool_call|>[{A}", "it ends in the middle"),
    ('<tool_call>{"name": "time", "arguments": {"a": NaN}}</tool_call>', "NaN is not JSON"),
    ('<tool_call>{"name": "time", "arguments": [1]}</tool_call>', "the arguments for time are no object"),
    ('<tool_call>{"nom": "time"}</tool_call>', "no name of a function in"),
    ("<tool_call>time()</tool_call>", "begins with a bracket, not with 't'"),
    ("<tool_call>{]</tool_call>", "a ] too many"),
    ('<|python_tag|>brave_search.call(query="x")', "begins with a bracket, not with 'b'"),
    ('<|tool_call|>[{"name": "time", "description": "", "parameters": {"type": "object"}}]', "no arguments for time"),
    ('{"name": "time", "arguments": {"a": 1}', "it ends in the middle"),
    ('{"name": "time", "arguments": {}} is what I would call', "more than calls"),
    ("[TOOL_CALLS]time[ARGS]{", "it ends in the middle"),
    ("<function=time>zone</function>", "begins with a bracket, not with 't'"),
    ("[TOOL_CALLS]time[ARG", "begins with a bracket, not with 't'"),
]


@pytest.mark.parametrize(("text", "content", "calls"), CALLS)
def test_calls(text: str, content: str, calls: list[ToolCall]) -> None:
    reply = parse_tool_calls(text)
    assert (reply.content, reply.calls, reply.problems) == (content, calls, [])
    assert parse_tool_calls(text, tools=[WEATHER, TIME]) == reply


@pytest.mark.parametrize(("text", "problem"), MALFORMED)
def test_what_is_no_call_stays_in_the_text_and_is_said(text: str, problem: str) -> None:
    reply = parse_tool_calls(text)
    assert (reply.content, reply.calls) == (text, [])
    (said,) = reply.problems
    assert "is no tool call, and stays in the text: " in said
    assert problem in said


@pytest.mark.parametrize("text", [case[0] for case in CALLS] + [case[0] for case in MALFORMED])
def test_every_cut_gives_the_same(text: str) -> None:
    whole = parse_tool_calls(text)
    cuts = [[text[:i], text[i:j], text[j:]] for i in range(len(text) + 1) for j in (i, (i + len(text)) // 2)]
    for pieces in [list(text), *cuts]:
        parser = ToolCallParser()
        contents = [parser.push(piece) for piece in pieces]
        contents.append(parser.flush())
        assert "".join(contents).strip() == whole.content
        assert (parser.calls, parser.problems) == (whole.calls, whole.problems)


def test_content_is_handed_out_as_early_as_it_is_certain() -> None:
    parser = ToolCallParser()
    pieces = ["I ", "look <", "b> ", "<tool_c", "all>{", B[1:], "</tool_call>", " ok"]
    assert [parser.push(piece) for piece in pieces] == ["I ", "look ", "<b> ", "", "", "", "", " ok"]
    assert parser.calls == [CALL_B]


def test_an_answer_of_json_calls_only_the_tools_that_there_are() -> None:
    reply = parse_tool_calls(A, tools=[TIME])
    assert (reply.content, reply.calls) == (A, [])
    assert reply.problems == ["the answer is no tool call, and stays in the text: no tool is called get_weather"]
    assert parse_tool_calls(f"<tool_call>{A}</tool_call>", tools=[TIME]).calls == [CALL_A]


def test_from_ids_where_the_markers_are_special_tokens(tmp_path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = f"So, é: <|tool_call|>[{A}]<|/tool_call|><|end|><|endoftext|>"
    ids = tokenizer.encode(text, parse_special=True, add_bos=False)
    reply = parse_tool_calls(ids, tokenizer)
    assert (reply.content, reply.calls) == ("So, é:", [CALL_A])
    assert parse_tool_calls(tokenizer.decode(ids, skip_special_tokens=True)).calls == []  # why ids are needed
    with pytest.raises(ValueError, match="need the tokenizer"):
        parse_tool_calls(ids)


def test_long_arguments_do_not_take_long() -> None:
    parser, long = ToolCallParser(), '{"name": "f", "arguments": {"text": "' + "a\\n" * 20_000 + '"}}'
    for start in range(0, len(long), 20):
        parser.push(long[start : start + 20])
    parser.flush()
    assert len(parser.calls[0].arguments["text"]) == 40_000

"""The schema of calls: what it accepts, by the grammar that is made of it."""

import json

import pytest
from chat_templates import TIME, WEATHER
from grammars import accepts
from templates import small_tokenizer

from phi3_jax.infer.sampling import Grammar
from phi3_jax.text import ToolCall, call_schema, parse_tool_calls

REFERRING = {
    "name": "tree",
    "parameters": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "$defs": {"node": {"type": "object", "properties": {"child": {"$ref": "#/$defs/node"}}, "required": []}},
        "required": ["root"],
    },
}


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ({"name": "get_weather", "arguments": {"city": "Rome"}}, True),
        ({"name": "get_weather", "arguments": {"city": "Rome", "unit": "C", "days": [1, 2]}}, True),
        ({"name": "time", "arguments": {}}, True),
        ({"name": "tree", "arguments": {"root": {"child": {"child": {}}}}}, True),
        ({"name": "get_weather", "arguments": {"city": 3}}, False),
        ({"name": "get_weather", "arguments": {"unit": "C"}}, False),
        ({"name": "get_weather", "arguments": {"city": "Rome", "unit": "K"}}, False),
        ({"name": "get_weather", "arguments": {"city": "Rome", "days": ["1"]}}, False),
        ({"name": "time", "arguments": {"city": "Rome"}}, False),
        ({"name": "date", "arguments": {}}, False),
        ({"name": "tree", "arguments": {"root": {"child": 3}}}, False),
        ({"name": "time"}, False),
    ],
)
def test_calls_that_fit(call, fits):
    pytest.importorskip("llguidance")
    tokenizer, grammar = small_tokenizer(None), Grammar.json_schema(call_schema([WEATHER, TIME, REFERRING]))
    text = json.dumps([call])
    assert accepts(tokenizer, grammar, text, tokenizer.eos_id) == fits
    assert accepts(tokenizer, grammar, json.dumps([call, call]), tokenizer.eos_id) == fits
    if fits:
        assert parse_tool_calls(text, tools=[WEATHER, TIME, REFERRING]).calls == [ToolCall(**call)]


def test_one_tool_and_none():
    pytest.importorskip("llguidance")
    tokenizer = small_tokenizer(None)
    grammar = Grammar.json_schema(call_schema([{"name": "f"}]))
    assert accepts(tokenizer, grammar, '[{"name": "f", "arguments": {}}]', tokenizer.eos_id)
    assert not accepts(tokenizer, grammar, "[]", tokenizer.eos_id)
    call = '{"name": "f", "arguments": {}}'
    one = Grammar.json_schema(call_schema([{"name": "f"}], most=1))
    assert accepts(tokenizer, one, f"[{call}]", tokenizer.eos_id)
    assert not accepts(tokenizer, one, f"[{call}, {call}]", tokenizer.eos_id)
    with pytest.raises(ValueError, match="there are no tools"):
        call_schema([])
    with pytest.raises(ValueError, match="the parameters of f are no JSON schema of an object; write"):
        call_schema([{"name": "f", "parameters": {"city": {"type": "str"}}}])

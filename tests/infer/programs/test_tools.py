"""Tools in phi3-generate and phi3-chat: calls are made, printed and answered."""

import dataclasses
import json

import pytest
from absl import flags
from absl.testing import flagsaver
from chats import small_chat
from generate_program import in_process

import phi3_jax
from phi3_jax.infer import Grammar, Sampling
from phi3_jax.infer.conversation import Conversation
from phi3_jax.infer.programs import chat_main
from phi3_jax.infer.programs import flags as common
from phi3_jax.text import call_schema

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
TIME = {
    "name": "time",
    "parameters": {"type": "object", "properties": {"zone": {"enum": [1, 2]}}, "required": ["zone"]},
}
CALL = '<tool_call>{"name": "time", "arguments": {"zone": 1}}</tool_call>'


@pytest.fixture(scope="module")
def caller(tiny, tmp_path_factory):
    """A tiny model with a token for each character, and a template that knows tools."""
    small = small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))
    return dataclasses.replace(small, tokenizer=dataclasses.replace(small.tokenizer, chat_template=TEMPLATE))


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TIME]))
    return str(tmp_path / "tools.json")


@pytest.fixture
def program(caller, monkeypatch, capfd):
    return in_process(caller, monkeypatch, capfd)


def forced(checkpoint, text):
    """Tokens that an answer begins with, so that it says this text; always as many, for the compiled programs' sake."""
    return [*checkpoint.tokenizer.encode(text.ljust(144), add_bos=False), checkpoint.generation.eos_token_ids[0]]


@pytest.mark.slow
def test_calls_are_printed_as_json(program, caller, tools):
    ids = ",".join(map(str, forced(caller, f"Let me look.{CALL}")))
    asked = [
        "--chat",
        "--prompt",
        "What time is it?",
        "--tools",
        tools,
        "--forced_tokens",
        ids,
        "--max_new_tokens",
        "150",
    ]
    content, call = program(*asked).splitlines()
    assert (content.strip(), json.loads(call)) == ("Let me look.", {"name": "time", "arguments": {"zone": 1}})


def test_required_calls_have_a_grammar(tools):
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", "--tools", tools, "--tool_choice", "required"])
        assert common.grammar(common.tools()) == Grammar.json_schema(call_schema([TIME]))
        flags.FLAGS(["phi3-generate", "--tools", tools, "--tool_choice", "one"])
        assert common.grammar(common.tools()) == Grammar.json_schema(call_schema([TIME], 1))


@pytest.mark.slow
def test_required_calls_fit_the_schemas(program, demo, tools, monkeypatch):
    pytest.importorskip("llguidance")
    tokenizer = dataclasses.replace(demo.tokenizer, chat_template=TEMPLATE)
    monkeypatch.setattr(phi3_jax, "load", lambda *args, **kwargs: dataclasses.replace(demo, tokenizer=tokenizer))
    asked = ["--chat", "--prompt", "What time is it in zone 2?", "--tools", tools, "--tool_choice", "one"]
    call = json.loads(program(*asked, "--max_new_tokens", "96"))
    assert call in [{"name": "time", "arguments": {"zone": zone}} for zone in (1, 2)] + [
        {"name": "time", "arguments": {}}
    ]


@pytest.mark.slow
def test_lines_with_tools_of_their_own(program, caller, tools, tmp_path):
    ask = [{"role": "user", "content": "What time is it?"}]
    called = [*ask, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "time"}}]}]
    lines = [
        {"messages": ask, "tools": [TIME], "forced_tokens": forced(caller, CALL)},
        {"messages": [*called, {"role": "tool", "content": "9:00"}], "forced_tokens": forced(caller, "<tool_call>[}")},
        {"prompt": "Hi", "forced_tokens": forced(caller, CALL)},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program(
        "--input",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--tools",
        tools,
        "--batch_size",
        "1",
        "--max_new_tokens",
        "150",
    )
    own, shared, plain = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    function = {"name": "time", "arguments": {"zone": 1}}
    assert own["tool_calls"] == [{"id": "call00000", "type": "function", "function": function}]
    assert own["content"] == ""
    assert (shared["content"].strip(), shared["tool_calls"]) == ("<tool_call>[}", [])
    assert shared["tool_problems"] == ["what follows <tool_call> is no tool call, and stays in the text: a } too many"]
    assert "tool_calls" not in plain


@pytest.mark.parametrize(
    ("line", "args", "message"),
    [
        ('{"prompt": "Hi"}', ["--tool_choice", "required"], r":1: --tool_choice=required needs --tools"),
        ('{"prompt": "Hi", "tools": [{"name": "f"}]}', [], r':1: "tools" are for chats: give "messages", or --chat'),
        ('{"messages": [{"role": "user", "content": ""}], "tools": []}', ["--beams", "2"], "beam search has no tools"),
    ],
)
def test_lines_whose_tools_make_no_sense(program, tmp_path, line, args, message):
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tools", "TOOLS"], "--tools needs --chat"),
        (["--chat", "--tool_choice", "required"], "--tool_choice=required needs --tools"),
        (["--chat", "--tools", "TOOLS", "--tool_choice", "required", "--regex", "a"], "only one of --regex, --tool_ch"),
        (["--chat", "--tools", "BAD"], r"bad\.json: not a JSON file with a list of functions: tools\[0\] is"),
    ],
)
def test_flags_that_contradict(program, tools, tmp_path, args, message):
    (tmp_path / "bad.json").write_text('[{"type": "function"}]')
    names = {"TOOLS": tools, "BAD": str(tmp_path / "bad.json")}
    with pytest.raises(ValueError, match=message):
        program("--prompt", "Hi", *(names.get(arg, arg) for arg in args))


def test_a_conversation_with_results(caller):
    def ask(text, says):
        conversation._sampling = Sampling(forced_tokens=forced(caller, says))
        return "".join(piece.text for piece in conversation.ask(text)).strip()

    conversation = Conversation(caller, tools=[TIME], max_new_tokens=150)
    assert ask("What time is it?", f"I look. {CALL} {CALL}") == "I look."
    assert [call.name for call in conversation.last.calls] == ["time", "time"]
    assert conversation.waiting == ["call00000", "call00001"]
    conversation.add_result("9:00")
    conversation.add_result("10:00")
    with pytest.raises(ValueError, match="no call waits for a result"):
        conversation.add_result("11:00")
    assert ask(None, "It is nine.") == "It is nine."
    user, called, first, second, answer = conversation.messages
    assert called["content"] == "I look."
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == [{"zone": 1}, {"zone": 1}]
    assert first == {"role": "tool", "tool_call_id": "call00000", "name": "time", "content": "9:00"}
    assert (second["content"], answer["content"].strip()) == ("10:00", "It is nine.")
    prompt = caller.tokenizer.decode(conversation.last.prompt_ids)
    assert prompt == phi3_jax.render_chat(caller.tokenizer, [user, called, first, second], tools=[TIME])
    assert "tool:9:00<|end|>" in prompt
    saved = conversation.messages
    conversation.restore(saved)
    assert conversation.messages == saved


def test_a_chat_on_the_terminal_takes_results(caller, capsys):
    conversation = Conversation(
        caller, sampling=Sampling(forced_tokens=forced(caller, CALL)), max_new_tokens=150, tools=[TIME]
    )
    chat = chat_main.Chat(conversation, on_terminal=False)
    chat.take("What time is it?")
    assert capsys.readouterr().out.strip() == '{"name": "time", "arguments": {"zone": 1}}'
    conversation._sampling = Sampling(forced_tokens=forced(caller, "Nine."))
    chat.take("/result 9:00")
    assert capsys.readouterr().out.strip() == "Nine."
    chat.take("/result 10:00")
    assert chat.failed
    assert "no call waits" in capsys.readouterr().err


def test_a_system_message_keeps_its_tools(caller):
    system = {"role": "system", "content": "", "tools": '[{"name": "f"}]'}
    conversation = Conversation(caller)
    with pytest.warns(UserWarning, match=r"drops the tools of messages\[0\]"):
        conversation.restore([system, {"role": "user", "content": "Hi"}])
    assert conversation.messages[0] == system

"""Words out of which templates, vocabularies or answers could make what nobody meant."""

import dataclasses
import json

import pytest
from chat_templates import QWEN, TEMPLATES, WEATHER, write_tokenizer
from vocabularies import train_sentencepiece, write

from phi3_jax.text import ToolCallParser, encode_answers, encode_chat, load_tokenizer, parse_tool_calls, render_chat


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def said(content, role="user"):
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ '<|' + messages[0].content[:3] + '|>' }}", "end of story"),
        ("{{ '<|' + messages[0].content[-3:] + '|>' }}", "the end"),
        ("{{ '<|%.3s|>' % messages[0].content }}", "endless"),
        ("<{{ messages[0].content.strip('*') }}>", "*|end|*"),
        ("{{ strftime_now('%f') }}<|{{ messages[0].content }}", "end|> x"),
        ("{{ messages[0] }}", "<|end|>"),
        ("{{ messages[0].content | urlencode }}", "<|end|>"),
        ("{% if messages[0].content == '<|end|>' %}yes{% else %}{{ messages[0].content }}{% endif %}", "<|end|>"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the checkpoint's chat template drops")
def test_no_control_token_and_no_mark_comes_of_words(plain, template, content):
    """The ids say what the text says, in letters."""
    tokenizer = dataclasses.replace(plain, chat_template=template)
    ids = encode_chat(tokenizer, said(content))
    assert not set(ids) & tokenizer.special_ids
    assert "".join(c for c in tokenizer.decode(ids) if not c.isdigit()) == "".join(
        c for c in render_chat(tokenizer, said(content)) if not c.isdigit()
    )


def test_training_learns_what_the_template_makes_of_special_strings(plain):
    """As `encode_chat` reads it: the strings in messages are as long as they are, and text."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = dataclasses.replace(plain, chat_template="{{ messages[0].content | length }}" + template)
    chat = [*said("<|end|>"), *said("Yes<|im_end|>", "assistant")]
    ids, [(begin, end)] = encode_answers(tokenizer, chat)
    assert ids == encode_chat(tokenizer, chat, add_generation_prompt=False)
    assert tokenizer.decode(ids).startswith("7<|im_start|>user\n<|end|><|im_end|>\n")
    assert tokenizer.decode(ids[begin:end]) == "Yes<|im_end|><|im_end|>"
    assert end - begin == len("Yes<|im_end|>") + 1  # letters, and one token


def test_symbols_of_a_sentencepiece_model_are_not_typed(tmp_path):
    train_sentencepiece(
        tmp_path / "tokenizer", "the cat sat\n" * 50, vocab_size=290, user_defined_symbols=["<|end|>", "<|user|>"]
    )
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    files = {"chat_template.jinja": template, "tokenizer_config.json": {"eos_token": "<|end|>"}}
    tokenizer = load_tokenizer(write(tmp_path, files))
    user, end = tokenizer.pieces.index("<|user|>"), tokenizer.pieces.index("<|end|>")
    ids = encode_chat(tokenizer, said("the<|end|><|user|>cat"))
    assert [i for i in ids if i in (user, end)] == [user, end]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<|end|><|user|>cat"
    assert tokenizer.encode("<|end|>", parse_special=True) == [end]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "f", "args": {"a": 1}}', "no arguments for f, but 'args'"),
        ('{"name": "f", "arguments": {"x": 1e999}}', "1e999 is not JSON"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "half of a surrogate pair"),
    ],
)
def test_calls_that_cannot_be_made_are_problems(text, problem):
    reply = parse_tool_calls(f"<tool_call>{text}</tool_call>")
    assert reply.calls == []
    assert text in reply.content
    assert problem in reply.problems[0]


def test_long_arguments_are_read_once():
    """In time that grows with their length: a mark in the middle of JSON is looked for only behind a bracket."""
    numbers = list(range(2000))
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": {"x": numbers}})
    parser, read = ToolCallParser(), 0
    whole = parser._read

    def counted(is_over):
        nonlocal read
        read += len(parser._text)
        return whole(is_over)

    parser._read = counted
    for i in range(0, len(text), 4):
        parser.push(text[i : i + 4])
    parser.flush()
    assert parser.calls[0].arguments == {"x": numbers}
    assert read < 40 * len(text)


def test_thoughts_in_a_folder_whose_template_speaks_of_them(tmp_path):
    """`<think>` is what an assistant says: its flag is kept, also where the template looks for it."""
    folder = write_tokenizer(tmp_path / "x")
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = {token["content"]: token["special"] for token in spec["added_tokens"]}
    (folder / "chat_template.jinja").write_text(QWEN)
    tokenizer = load_tokenizer(folder)
    kinds = {token.content: token.special for token in tokenizer.added_tokens}
    assert {name: kinds[name] for name in flags if "think" in name} == {n: f for n, f in flags.items() if "think" in n}


def test_an_answer_begins_behind_its_header(plain):
    """Also where the template knows no header of its own to ask with, and the answer has thoughts or calls."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = dataclasses.replace(plain, chat_template=template)
    for content in ("Nine.", "<think>\nHm\n</think>\nNine.", " Nine. "):
        ids, [(begin, end)] = encode_answers(tokenizer, [*said("Time?"), *said(content, "assistant")])
        assert tokenizer.decode(ids[begin:end]) == f"{content}<|im_end|>"


def test_an_empty_system_message_loses_nothing(plain, recwarn):
    tokenizer = dataclasses.replace(plain, chat_template=TEMPLATES["Phi-3-medium"])
    chat = [*said("", "system"), *said("Hi"), *said("Yo", "assistant")]
    assert encode_answers(tokenizer, chat) == encode_answers(tokenizer, chat[1:])
    assert encode_chat(tokenizer, chat[:2]) == encode_chat(tokenizer, chat[1:2])
    assert not recwarn


def test_fields_that_hold_nothing_lose_nothing(plain):
    tokenizer = dataclasses.replace(plain, chat_template=QWEN)
    dumped = said("Hi", "assistant")[0] | {"refusal": None, "annotations": [], "audio": None}
    assert encode_chat(tokenizer, [dumped], tools=[WEATHER]) == encode_chat(
        tokenizer, said("Hi", "assistant"), tools=[WEATHER]
    )
    with pytest.raises(ValueError, match=r"unknown fields \['refusal'\]"):
        encode_chat(tokenizer, [dumped | {"refusal": "No."}])


def test_a_template_gets_the_named_tokens(tmp_path):
    folder = write_tokenizer(tmp_path / "x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = [token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"][:2]]
    config |= {"pad_token": names[0], "extra_special_tokens": {"image_token": names[1]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ pad_token }}{{ image_token }}{{ messages[0].content }}")
    assert render_chat(load_tokenizer(folder), said("a")) == f"{names[0]}{names[1]}a"

"""Chat templates, with tools and thoughts: the text and the ids of transformers' apply_chat_template."""

import functools
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CONVERSATIONS, PUBLISHED, TEMPLATES, write_tokenizer

import phi3_jax
from phi3_jax.text import encode_answers

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")
pytest.importorskip("transformers", reason="the reference needs torch and transformers: make parity")

# What transformers loses without a word reaches the model here, and what it fails at works:
# Phi-4-mini's template gets tools in its system message, and calls as the model writes them.
OURS_ALONE = ["Phi-4-mini", "Phi-4-mini-reasoning"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory) -> Callable[[str], phi3_jax.Tokenizer]:
    """The tokenizer of a folder with a template in it, which says something about the added tokens, too."""

    @functools.cache
    def load(name: str) -> phi3_jax.Tokenizer:
        own = shutil.copytree(folder, tmp_path_factory.mktemp("template") / "x")
        (own / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
        return phi3_jax.load_tokenizer(own)

    return load


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids(ours, theirs, name):
    tokenizer = ours(name)
    compared = 0
    for conversation in CONVERSATIONS.values():
        messages, tools, options = (conversation.get(key) for key in ("messages", "tools", "options"))
        has_calls = any("tool_calls" in message for message in messages)
        if name in OURS_ALONE and (tools or has_calls):
            continue
        for generation_prompt in (True, False):
            given = {"chat_template": TEMPLATES[name], "tools": tools, "add_generation_prompt": generation_prompt}
            given |= options or {}
            asked = {"tools": tools, "add_generation_prompt": generation_prompt, "template_options": options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that tools and system messages are dropped
                try:
                    text = theirs.apply_chat_template(messages, tokenize=False, **given)
                except Exception:  # the template's own, and those of Python
                    with pytest.raises(ValueError, match=r"the chat template (refuses|fails on) these messages"):
                        phi3_jax.encode_chat(tokenizer, messages, **asked)
                    continue
                assert phi3_jax.render_chat(tokenizer, messages, **asked) == text
                ids = theirs.apply_chat_template(messages, return_dict=False, **given)
                assert phi3_jax.encode_chat(tokenizer, messages, **asked) == list(ids)
                compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", ["Phi-4-reasoning", "ChatML"])
def test_answers_are_the_generation_blocks(ours, theirs, name):
    for messages in (CONVERSATIONS["an answer"]["messages"][1:], CONVERSATIONS["turns"]["messages"][:2]):
        ids, spans = encode_answers(ours(name), messages)
        reference = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == reference["input_ids"]
        learned = [int(any(begin <= i < end for begin, end in spans)) for i in range(len(ids))]
        assert learned == reference["assistant_masks"]


def random_chat(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Turns with calls, results and thoughts, of words that templates and JSON could stumble over."""
    words = [
        "a",
        " ",
        "\n",
        "é",
        '"',
        "\\",
        "{",
        "}",
        "<",
        ">",
        "|",
        "[",
        "end",
        "</think>",
        "<think>",
        "{{",
        "{%",
        "</",
    ]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randrange(5)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": text()})
        answer = {"role": "assistant", "content": text()}
        function = {"name": text(), "arguments": {text(): [text(), {text(): rng.choice([1, 2.5, None, True])}]}}
        called = answer | {"tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
        result = {"role": "tool", "tool_call_id": "call00001", "content": text()}
        thought = answer | {"reasoning_content": text()}
        messages += rng.choice([[answer], [thought], [called, result, answer]])
    properties = {text(): {"type": "string", "description": text()}}
    function = {"name": text(), "description": text(), "parameters": {"type": "object", "properties": properties}}
    return messages[: rng.choice([-1, None])], rng.choice([None, [{"type": "function", "function": function}]])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in OURS_ALONE])
@pytest.mark.filterwarnings("ignore:.*the checkpoint's chat template drops")
def test_random_chats(ours, theirs, name):
    tokenizer, rng = ours(name), random.Random(name)
    for _ in range(10):
        messages, tools = random_chat(rng)
        given = {"chat_template": TEMPLATES[name], "tools": tools, "add_generation_prompt": True}
        text = theirs.apply_chat_template(messages, tokenize=False, **given)
        assert phi3_jax.render_chat(tokenizer, messages, tools=tools) == text
        ids = theirs.apply_chat_template(messages, return_dict=False, **given)
        assert phi3_jax.encode_chat(tokenizer, messages, tools=tools) == list(ids)


def test_there_are_enough_published_templates():
    assert len(PUBLISHED) >= 8
    assert len(TEMPLATES) >= 11

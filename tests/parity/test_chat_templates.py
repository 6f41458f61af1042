"""Chat templates, with tools and thoughts: the text and the ids of transformers' apply_chat_template."""

import dataclasses
import warnings
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
def ours(folder) -> phi3_jax.Tokenizer:
    return phi3_jax.load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids(ours, theirs, name):
    tokenizer = dataclasses.replace(ours, chat_template=TEMPLATES[name])
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
        ids, spans = encode_answers(dataclasses.replace(ours, chat_template=TEMPLATES[name]), messages)
        reference = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == reference["input_ids"]
        learned = [int(any(begin <= i < end for begin, end in spans)) for i in range(len(ids))]
        assert learned == reference["assistant_masks"]


def test_there_are_enough_published_templates():
    assert len(PUBLISHED) >= 8
    assert len(TEMPLATES) >= 11

"""Which tokens of a chat an assistant says: recorded by hand for the real vocabularies, found otherwise for others."""

import os
import random
from pathlib import Path

import pytest
from templates import PHI4, PHI4_MINI, small_tokenizer
from vocabularies import train_sentencepiece, write

import phi3_jax
from phi3_jax.text import Tokenizer, encode_answers, encode_chat, encode_spans, load_tokenizer

QUESTION, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}
SMOLLM2 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]


def said(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[list[str | None]]:
    ids, answers = encode_answers(tokenizer, messages)
    assert ids == encode_chat(tokenizer, messages, add_generation_prompt=False)
    return [[tokenizer.piece(i) for i in ids[begin:end]] for begin, end in answers]


@pytest.mark.parametrize("backend", ["tokenizers", "sentencepiece"])
def test_real_phi3_eats_the_newlines(backend):
    if not os.environ.get("PHI3_TOKENIZER_DIR"):
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    tokenizer = load_tokenizer(Path(os.environ["PHI3_TOKENIZER_DIR"]), backend)
    ids, answers = encode_answers(tokenizer, chat("Hello", "Paris"))
    assert ids == [32010, 15043, 32007, 32001, 3681, 32007, 32000]
    assert answers == [(4, 6)]  # Paris <|end|>; not the header, nor what the template writes at the very end
    system = {"role": "system", "content": "Be brief."}
    assert said(tokenizer, [system, *chat("Hi", "Ho ho", "Bye", "")]) == [["▁Ho", "▁ho", "<|end|>"], ["<|end|>"]]
    # White space in front is eaten by the header's token, as it is when the model is asked.
    assert said(tokenizer, chat("a\n", "\n  x<|end|>\n")) == [
        ["▁x", "<", "|", "end", "|", ">", "<0x0A>", "<|end|>"],
    ]


def test_demo_does_not_eat_the_newline(demo):
    tokenizer = demo.tokenizer
    assert said(tokenizer, chat("What is it?", "Paris.", "And?", " Rome")) == [
        ["Paris", ".", "<|im_end|>"],
        ["ĠRome", "<|im_end|>"],
    ]
    with pytest.raises(ValueError, match=r"one token of the end of 'assistant\\n' and the beginning of '\\n\\nParis"):
        encode_answers(tokenizer, chat("What is it?", "\n\nParis."))


def reference(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[tuple[int, int]]:
    """From what the model is asked with to the first end token behind it; for templates that only append."""
    end, answers = tokenizer.pieces.index("<|end|>"), []
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = encode_chat(tokenizer, messages[:index], add_generation_prompt=True)
            assert ids[: len(asked)] == asked
            answers.append((len(asked), ids.index(end, len(asked)) + 1))
    return answers


@pytest.mark.parametrize("template", [PHI4_MINI, SMOLLM2, PHI4.replace("im_end", "end").replace("<|im_sep|>", ":")])
def test_answers_begin_where_the_question_to_the_model_ends(template):
    rng, tokenizer = random.Random(0), small_tokenizer(template)
    for _ in range(30):
        pieces = ["a", " ", "\n", "<|end|>", "é", "<|assistant|>", "Hi there", "user\n"]
        texts = ["".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(2 * rng.randrange(1, 4))]
        assert encode_answers(tokenizer, chat(*texts))[1] == reference(tokenizer, chat(*texts))


def test_sentencepiece_with_a_header_of_plain_text(tmp_path):
    """The header and the answer are one piece of text, in front of which the vocabulary puts a space."""
    train_sentencepiece(tmp_path / "tokenizer", "assistant user say Hello and Paris\n" * 9, vocab_size=300)
    added = {str(400 + i): {"content": c, "special": True} for i, c in enumerate(["<|im_start|>", "<|end|>"])}
    write(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": added}, "chat_template.jinja": SMOLLM2})
    (answer,) = said(load_tokenizer(tmp_path), chat("say", "Paris and Hello"))
    assert "".join(map(str, answer)) == "Paris▁and▁Hello<|end|>"


def test_templates_that_strip_answers():
    tokenizer = small_tokenizer(PHI4_MINI.replace("m['content']", "m['content'] | trim"))
    assert said(tokenizer, chat("x", " \n a b\t")) == [["a", "Ġ", "b", "<|end|>"]]


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = small_tokenizer(PHI4_MINI)
    assert encode_answers(tokenizer, chat("x", "y", "z")) == encode_answers(tokenizer, chat("x", "y"))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (PHI4_MINI, [QUESTION], 'no message has the role "assistant"'),
        (PHI4_MINI, [], "messages is empty"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", [QUESTION, ANSWER], "does not end every answer"),
        ("{% for m in messages %}{{ '<|user|>' + m.content }}{% endfor %}", chat(*"abcd"), "does not end every answer"),
        ("{% for m in messages %}{{ m.content | length }}<|end|>{% endfor %}", [ANSWER], "does not write answers"),
        ("{% for m in messages %}{{ m.content ~ m.content }}<|end|>{% endfor %}", [ANSWER], "does not write answers"),
        ("{{ messages[0].content }}<|end|>", [QUESTION, ANSWER], "does not write answers as they are said"),
    ],
)
def test_templates_and_chats_that_cannot_be_learned_from(template, messages, message):
    with pytest.raises(ValueError, match=message):
        encode_answers(small_tokenizer(template), messages)


@pytest.mark.parametrize(("role", "index"), [("system", 0), ("tool", 2), ("developer", 1)])
def test_a_message_that_the_template_drops_is_not_learned_around(role, index):
    template = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}<|end|>{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}, ANSWER]
    messages.insert(index, {"role": role, "content": "Hi"})  # the user's words must not hide the loss
    which = "the system message" if role == "system" else rf"messages\[{index}\]"
    with pytest.raises(ValueError, match=rf"drops {which}, of role '{role}'; put its text into a message of the user"):
        encode_answers(small_tokenizer(template), messages)


def test_spans_of_plain_text_and_bos():
    tokenizer = small_tokenizer(None)  # bytes, with a bos in front
    assert encode_spans(tokenizer, "ab€cd", [(0, 2), (2, 3), (3, 5), (5, 5)]) == (
        tokenizer.encode("ab€cd"),
        [(1, 3), (3, 6), (6, 8), (8, 8)],
    )


def test_checkpoints_of_the_library_have_answers(demo):
    ids, [(begin, end)] = encode_answers(demo.tokenizer, [QUESTION, ANSWER])
    assert phi3_jax.encode_chat(demo.tokenizer, [QUESTION]) == ids[:begin]
    assert ids[end - 1] in demo.generation.eos_token_ids

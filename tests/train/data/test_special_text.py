"""Special tokens that plain texts spell: with parse_special the ids of transformers, else characters, which is told."""

import os
from pathlib import Path

import pytest
from templates import PHI4_MINI, small_tokenizer

from phi3_jax.text import Tokenizer, encode_chat, load_tokenizer, render_chat
from phi3_jax.train.data import read_record
from phi3_jax.train.settings import Settings

PLAIN = Settings(sequence_length=200)
SPECIAL = Settings(sequence_length=200, parse_special=True)
SMALL = small_tokenizer(PHI4_MINI)
EOS = 32000
# Recorded with AutoTokenizer.from_pretrained(folder)(text)["input_ids"] of transformers 5.23.
RECORDED = [
    ("<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n", [32010, 6324, 32007, 32001, 15043, 29991, 32007]),
    (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n<|endoftext|>",
        [
            32006,
            1522,
            11473,
            29889,
            32007,
            32010,
            29871,
            29906,
            29974,
            29906,
            29973,
            32007,
            32001,
            29871,
            29946,
            32007,
            32000,
        ],
    ),
    ("<s> <|user|> a <|end|>", [1, 259, 32010, 263, 29871, 32007]),
    (
        "No special text: <b>bold</b> <|nothing|>",
        [1939, 4266, 1426, 29901, 529, 29890, 29958, 8934, 829, 29890, 29958, 529, 29989, 28450, 29989, 29958],
    ),
    ("é<|end|><|end|>  x<|endoftext|>\n", [904, 32007, 32007, 921, 32000, 29871, 13]),
]


@pytest.fixture(scope="module")
def phi3() -> Tokenizer:
    if not os.environ.get("PHI3_TOKENIZER_DIR"):
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    return load_tokenizer(Path(os.environ["PHI3_TOKENIZER_DIR"]))


@pytest.mark.parametrize(("text", "ids"), RECORDED)
def test_texts_have_transformers_ids_and_end_with_one_eos(text, ids, phi3):
    expected = ids if ids[-1] == EOS else [*ids, EOS]
    found = read_record({"text": text}, phi3, SPECIAL)
    assert found.spelled == ""
    assert found.texts[0].tokens.tolist() == expected
    assert found.texts[0].learned.tolist() == [False] + [True] * (len(expected) - 1)
    spelled = read_record({"text": text}, phi3, PLAIN)
    assert spelled.texts[0].tokens.tolist() == [*phi3.encode(text), EOS]
    if text.startswith("No "):
        assert spelled.spelled == ""
        assert spelled.texts[0].tokens.tolist() == expected
    else:
        assert spelled.spelled in ("<|user|>", "<|system|>", "<s>", "<|end|>")
        assert not {32007, 32010, 32001} & set(spelled.texts[0].tokens.tolist())


# The line break behind <|assistant|> is a part of that token.
@pytest.mark.parametrize(
    ("completion", "first"), [("<|assistant|>", 12), ("\n4", 13), ("2+2", 6), ("<|end|>\n<|endo", 15)]
)
def test_completions_begin_where_the_prompt_ends(completion, first, phi3):
    text, ids = RECORDED[1]
    at = text.index(completion)
    found = read_record({"prompt": text[:at], "completion": text[at:]}, phi3, SPECIAL).texts[0]
    assert found.tokens.tolist() == ids
    assert found.learned.tolist() == [i >= first for i in range(len(ids))]


def test_preferences(phi3):
    settings = Settings(sequence_length=200, parse_special=True, method="dpo", pack=False)
    record = {"prompt": "<|user|>\nHi<|end|>\n<|assistant|>\n", "chosen": "Hello!<|end|>", "rejected": "<|end|>\n"}
    chosen, rejected = read_record(record, phi3, settings).texts
    assert chosen.tokens.tolist() == [*RECORDED[0][1], EOS]
    assert rejected.tokens.tolist() == [32010, 6324, 32007, 32001, 32007, EOS]
    assert [text.learned.sum() for text in (chosen, rejected)] == [4, 2]


def test_a_rendered_chat_is_the_chat_and_a_content_is_always_text(phi3):
    for tokenizer in (phi3, SMALL):
        messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
        text = render_chat(tokenizer, messages, add_generation_prompt=False)
        everything = Settings(sequence_length=200, loss_on="all")
        (chat,) = read_record({"messages": messages}, tokenizer, everything).texts
        (plain,) = read_record({"text": text}, tokenizer, SPECIAL).texts
        bos = [tokenizer.bos_id] if tokenizer.add_bos else []
        assert plain.tokens.tolist() == bos + chat.tokens.tolist()
        messages[0]["content"] = "say <|end|>"
        for settings in (PLAIN, SPECIAL):
            found = read_record({"messages": messages}, tokenizer, settings)
            assert found.spelled == ""
            assert found.texts[0].tokens.tolist() == encode_chat(tokenizer, messages, add_generation_prompt=False)

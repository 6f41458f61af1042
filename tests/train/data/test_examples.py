"""Lines of data files: which tokens they give, which of these are learned, and what is wrong with bad ones."""

import dataclasses
import json

import numpy as np
import pytest
from templates import PHI4_MINI, small_tokenizer

from phi3_jax.train.data import read_entries, read_record
from phi3_jax.train.settings import Settings

TOKENIZER = small_tokenizer(PHI4_MINI)  # one token per byte; <s> is bos, <|endoftext|> eos
BOS, EOS, USER, END, ASSISTANT = (
    TOKENIZER.pieces.index(t) for t in ("<s>", "<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>")
)
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def byte(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def read(record, **changes):
    changes = {"sequence_length": 40, "pack": changes.get("method") != "dpo"} | changes
    example = read_record(record, TOKENIZER, Settings(**changes))
    for text in example.texts:
        assert text.tokens.dtype == np.int32
        assert text.learned.dtype == bool
    return [(list(t.tokens), "".join("-x"[int(flag)] for flag in t.learned)) for t in example.texts], example.unused


def test_each_form():
    chat = [USER, *byte("ab"), END, ASSISTANT, *byte("cd"), END, EOS]
    assert read({"messages": CHAT}) == ([(chat, "-----xxx-")], set())
    assert read({"messages": CHAT, "id": 7, "source": "x"}, loss_on="all") == ([(chat, "-xxxxxxxx")], {"id", "source"})

    plain = [BOS, *byte("ab<|end|>c"), EOS]  # what a line says is text
    assert read({"prompt": "ab", "completion": "<|end|>c"}) == ([(plain, "---xxxxxxxxx")], set())
    assert read({"prompt": "ab", "completion": "<|end|>c"}, loss_on="all") == ([(plain, "-xxxxxxxxxxx")], set())
    assert read({"text": "ab<|end|>c"}) == ([(plain, "-xxxxxxxxxxx")], set())
    assert read({"prompt": "", "completion": "é"}) == ([([BOS, *byte("é"), EOS], "-xxx")], set())


def test_preferences_learn_the_last_answer_only():
    later = [*CHAT, {"role": "user", "content": "e"}]
    head = [USER, *byte("ab"), END, ASSISTANT, *byte("cd"), END, USER, *byte("e"), END, ASSISTANT]
    chosen, rejected = ([*head, *byte(reply), END, EOS] for reply in ("yes", "n"))
    expected = [(chosen, "-" * 12 + "xxxx-"), (rejected, "-" * 12 + "xx-")]
    assert read({"messages": later, "chosen": "yes", "rejected": "n"}, method="dpo") == (expected, set())
    expected = [([BOS, *byte(f"ab{c}"), EOS], "---xx") for c in "yn"]
    assert read({"prompt": "ab", "chosen": "y", "rejected": "n", "n": 1}, method="dpo") == (expected, {"n"})


def test_long_texts_are_cut_into_rows():
    ids = [BOS, *byte("abcdefgh"), EOS]  # ten tokens
    assert read({"text": "abcdefgh"}, sequence_length=4) == (
        [(ids[:4], "-xxx"), (ids[4:8], "-xxx"), (ids[8:], "-x")],
        set(),
    )
    # Nothing is left to predict in a last piece of one token.
    assert read({"text": "abcdefgh"}, sequence_length=3) == ([(ids[i : i + 3], "-xx") for i in (0, 3, 6)], set())


@pytest.mark.parametrize(
    ("line", "changes", "reason"),
    [
        (b'{"text": "a"', {}, "it is not JSON"),
        (b'{"text": "\xff"}', {}, "it is not JSON"),
        (b"[" * 100_000, {}, "it is not JSON"),
        (b'["text"]', {}, "JSON but not an object"),
        (b'{"text": 3}', {}, "text is not a string but int"),
        (
            b'{"txt": "a"}',
            {},
            r"has the fields \['txt'\]; method=sft needs messages, or completion and prompt, or text",
        ),
        (b'{"text": "a", "messages": []}', {}, "has the fields"),
        (b'{"prompt": "a"}', {}, "has the fields"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', {}, "method=sft needs"),
        (b'{"text": "a"}', {"method": "dpo", "pack": False}, "method=dpo needs chosen and rejected, with"),
        (
            b'{"messages": 3, "chosen": "a", "rejected": "b"}',
            {"method": "dpo", "pack": False},
            "messages is not a list",
        ),
        (b'{"messages": []}', {}, "messages is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', {}, "no message has the role"),
        (b'{"messages": [{"from": "human", "value": "a"}]}', {}, "no message has the role"),
        (b'{"messages": [{"speaker": "human", "value": "a"}]}', {}, r"messages\[0\] is .* without a role"),
        (b'{"text": "\\ud800"}', {}, "not valid Unicode"),
        (
            json.dumps({"messages": CHAT}).encode(),
            {"sequence_length": 8},
            r"9 tokens, more than a row \(sequence_length",
        ),
        (json.dumps({"messages": CHAT}).encode(), {"sequence_length": 8, "loss_on": "all"}, "raise sequence_length"),
        (b'{"prompt": "abcdefgh", "completion": "i"}', {"sequence_length": 10}, "11 tokens, more than a row"),
    ],
)
def test_bad_lines_say_what_is_wrong(line, changes, reason, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(line)
    (entry,) = read_entries(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=reason):
        read_record(entry.fields(), TOKENIZER, Settings(**changes))


def test_texts_have_to_end():
    tokenizer = dataclasses.replace(TOKENIZER, eos_id=None)
    with pytest.raises(ValueError, match="names no eos token"):
        read_record({"text": "a"}, tokenizer, Settings())

"""Tokenizer files as they are found: variants that the tokenizers library reads, flags, and files that contradict."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from vocabularies import byte_level_spec, train_sentencepiece, write

from phi3_jax.text import Tokenizer, encode_chat, load_tokenizer

PREPEND = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
TEXTS = ["", "the cat", " a", "<s> a<|new|>b", "a <|new|> b", "<|new|><s>", "x<|NEW|>\n", "a<|e <s>the", "é🙂"]


def pieces_spec(**changes: Any) -> dict[str, Any]:
    """A Llama-like tokenizer.json whose added token <|new|> is looked for in normalised text."""
    letters = [*map(chr, range(33, 127)), "▁", "é"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, "th", "the", "▁the"])}
    spec = byte_level_spec()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    return {
        **spec,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["t", "h"], ["th", "e"], ["▁", "the"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
        "normalizer": {"type": "Sequence", "normalizers": PREPEND},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [BACK, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [
            {"id": 1, "content": "<s>", **flags, "normalized": False},
            {"id": len(vocab), "content": "<|new|>", **flags, "normalized": True},
        ],
        **changes,
    }


def template(*single: str) -> dict[str, Any]:
    """A post-processor that puts tokens of `pieces_spec` around the text, which is "A"."""
    ids = {"<s>": 1, "</s>": 2}
    items = [{"Sequence" if s == "A" else "SpecialToken": {"id": s, "type_id": 0}} for s in single]
    known = {s: {"id": s, "ids": [ids[s]], "tokens": [s]} for s in single if s != "A"}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": items, "pair": pair, "special_tokens": known}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}


@pytest.mark.parametrize(
    "spec",
    [
        pieces_spec(),
        pieces_spec(normalizer={"type": "Lowercase"}),
        pieces_spec(normalizer=None, pre_tokenizer=METASPACE, decoder=METASPACE),
        pieces_spec(normalizer=PREPEND[1], decoder={"type": "Sequence", "decoders": [BACK]}),
        pieces_spec(post_processor=template("</s>", "A")),
        pieces_spec(post_processor=template("<s>", "A", "</s>")),
        pieces_spec(post_processor={"type": "Sequence", "processors": [template("A", "</s>")]}),
    ],
    ids=["llama", "lowercase", "metaspace", "replace", "another bos", "eos behind", "only eos"],
)
def test_ids_and_texts_of_the_library(tmp_path: Path, spec: dict[str, Any]) -> None:
    """Normalised added tokens, post-processors and decoders of other kinds than Phi-3's."""
    config = {"bos_token": "<s>", "added_tokens_decoder": {}}
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec, "tokenizer_config.json": config}))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lowers = spec["normalizer"] == {"type": "Lowercase"}
    for text in TEXTS:
        wanted = library.encode(text).ids
        if lowers and "NEW" in text:  # what a user typed otherwise does not become a special token
            assert 358 in wanted
            assert 358 not in ours.encode(text, parse_special=True)
            continue
        if ours.opening == (1,) and text.startswith("<s>"):
            wanted = wanted[1:]
        assert ours.encode(text, parse_special=True) == wanted, text
        assert (
            ours.encode(text, parse_special=True, add_bos=False) == library.encode(text, add_special_tokens=False).ids
        )
        assert ours.decode(wanted) == library.decode(wanted, skip_special_tokens=False), text
        assert 1 not in ours.encode(text, add_bos=False)
        assert 358 not in ours.encode(text)


def test_a_prompt_is_not_closed(tmp_path: Path) -> None:
    spec = pieces_spec(post_processor=template("<s>", "A", "</s>"))
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec}))
    assert ours.encode("")[-1] == 2
    assert ours.encode("", add_eos=False) == ours.encode("", add_bos=True) == [1]
    assert ours.encode("", add_bos=False) == []


def test_typed_text_in_a_chat_with_a_normalised_special_token(tmp_path: Path) -> None:
    source = "{% for m in messages %}<|new|>{{ m.content }} <|new|>{% endfor %}"
    files = {"tokenizer.json": pieces_spec(), "chat_template.jinja": source}
    ours = load_tokenizer(write(tmp_path, files))
    ids = encode_chat(ours, [{"role": "user", "content": "a <|new|>b"}], add_generation_prompt=False)
    assert ids.count(358) == 2
    assert ours.decode(ids) == " <|new|>a <|new|>b <|new|>"


def marked(special: bool = False, **settings: Any) -> dict[str, Any]:
    """Files whose added tokens are not special by their flags."""
    spec = byte_level_spec()
    names = ["<|end|>", "<|user|>", "<|tool_call|>", "[X]", "<think>", "user", "<bos>", "[PAD]", "<gap>"]
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": special}
    spec["added_tokens"] = [{"id": len(spec["model"]["vocab"]) + i, "content": c, **blank} for i, c in enumerate(names)]
    source = (
        "{% for m in messages %}[X]{{ '<' + 'think>' }}{{ m.content }} user{{ eos_token }}{% endfor %}{{ '<think>' }}"
    )
    return {"tokenizer.json": spec, "tokenizer_config.json": {"bos_token": "<bos>", "chat_template": source} | settings}


def test_markers_are_special_whatever_their_flags_say(tmp_path: Path) -> None:
    """Early Phi-3 folders have `"special": false` for <|end|>; then what a user types would end the turn."""
    ours = load_tokenizer(write(tmp_path, marked()))
    kinds = {token.content: (token.special, token.hidden) for token in ours.added_tokens}
    assert kinds == {
        "<|end|>": (True, True),
        "<|user|>": (True, True),
        "<|tool_call|>": (True, False),  # part of an answer
        "[X]": (True, False),  # the template writes it
        "<think>": (False, False),  # what is said, though the template writes it
        "user": (False, False),  # a word, though the template writes it
        "<bos>": (True, True),
        "[PAD]": (True, True),
        "<gap>": (False, False),
    }
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for token in ours.added_tokens:
        assert ours.encode(f"a{token.content}b", parse_special=True) == library.encode(f"a{token.content}b").ids
        assert (token.id in ours.encode(f"a{token.content}b")) != token.special
        assert ours.decode([token.id], skip_special_tokens=True) == ("" if token.hidden else token.content)
    text = json.dumps(load_tokenizer(write(tmp_path / "special", marked(special=True))).decode(range(263, 272)))
    assert "<gap>" in text


def test_markers_of_a_sentencepiece_model(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer", "the cat sat on the mat\n" * 5, vocab_size=280)
    files = {"added_tokens.json": {"<|end|>": 290, "<|tool_call|>": 291, "plain": 292}}
    ours = load_tokenizer(write(tmp_path, files))
    for token_id, text in ((290, "<|end|>"), (291, "<|tool_call|>")):
        assert token_id not in ours.encode(f"the{text}")
        assert token_id in ours.encode(f"the{text}", parse_special=True)
    assert ours.encode("plain") == [292]
    assert ours.decode([290, 291], skip_special_tokens=True) == "<|tool_call|>"


def test_a_byte_order_mark_in_any_file(tmp_path: Path) -> None:
    files = {**marked(), "config.json": {"vocab_size": 290}, "added_tokens.json": {}, "special_tokens_map.json": {}}
    plain = load_tokenizer(write(tmp_path / "plain", files))
    marks = {name: "\ufeff" + json.dumps(content) for name, content in files.items()}
    ours = load_tokenizer(write(tmp_path / "marked", {**marks, "chat_template.jinja": "\ufeff" + plain.chat_template}))
    assert (ours.pieces, ours.added_tokens, ours.chat_template) == (
        plain.pieces,
        plain.added_tokens,
        plain.chat_template,
    )


def load(folder: Path, files: dict[str, Any], *said: str) -> Tokenizer:
    """Loads, and checks that one warning says all of this."""
    with pytest.warns(UserWarning, match=re.escape(said[0])) as caught:
        ours = load_tokenizer(write(folder, files))
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert all(text in str(caught[0].message) for text in said), str(caught[0].message)
    return ours


def test_files_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    """What is read is transformers' choice (5.23); tests/parity/test_tokenizers.py holds that at random."""
    other = {"special_tokens_map.json": {"eos_token": "[PAD]"}}
    ours = load(tmp_path / "a", {**marked(eos_token="<|end|>"), **other}, "'[PAD]'", "'<|end|>'", "special_tokens_map")
    assert ours.eos_token == "[PAD]"
    ours = load(tmp_path / "b", {**marked(eos_token="<|end|>", added_tokens_decoder={}), **other}, "'<|end|>' in tok")
    assert ours.eos_token == "<|end|>"
    ours = load(
        tmp_path / "c", {**marked(added_tokens_decoder={}), "added_tokens.json": {"<|end|>": 7}}, "{'<|end|>': 7}"
    )
    assert ours.encode("<|end|>", parse_special=True) == [263]
    entry = {"content": "<renamed>", "special": True}
    ours = load(tmp_path / "d", marked(added_tokens_decoder={"264": entry}), "'<renamed>' has the id 272", "not 264")
    assert ours.encode("<renamed><|user|>", parse_special=True) == [272, 264]
    ours = load(tmp_path / "e", marked(eos_token="<absent>"), "'<absent>'", "new id 272")
    assert ours.eos_id == 272
    write(tmp_path / "f", {})
    train_sentencepiece(tmp_path / "f" / "tokenizer", "the cat sat on the mat\n" * 5, vocab_size=280)
    ours = load(tmp_path / "f", marked(), "tokenizer.json is read", "tokenizer.model", "'<unk>' there")
    assert ours.pieces[0] == "!"


def test_a_renamed_special_token_beside_tokenizer_model(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer", "the cat sat on the mat\n" * 5, vocab_size=280)
    model = load_tokenizer(tmp_path)
    pieces = ["<mine>" if piece == "</s>" else piece for piece in model.pieces]
    spec = pieces_spec()
    spec["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    spec["added_tokens"] = [spec["added_tokens"][0] | {"id": 2, "content": "<mine>"}]
    files = {"tokenizer.json": spec, "tokenizer_config.json": {"eos_token": "<mine>"}}
    ours = load_tokenizer(write(tmp_path, files))
    assert ours.encode("<mine>", parse_special=True) == [2] == [ours.eos_id]
    # Without tokenizer.json, tokenizer_config.json renames it, too.
    (tmp_path / "tokenizer.json").unlink()
    config = {"added_tokens_decoder": {"2": {"content": "<mine>", "special": True}}, "eos_token": "<mine>"}
    ours = load_tokenizer(write(tmp_path, {"tokenizer_config.json": config}))
    assert ours.encode("<mine>the", parse_special=True) == [2, *model.encode("the")]


def test_chat_templates_in_several_places(tmp_path: Path) -> None:
    ours = load(
        tmp_path / "a", {**marked(), "chat_template.jinja": "J"}, "chat_template.jinja", "tokenizer_config.json"
    )
    assert ours.chat_template == "J"
    more = tmp_path / "b" / "additional_chat_templates"
    more.mkdir(parents=True)
    write(more, {"tool_use.jinja": "T", "default.jinja": "D"})
    ours = load(tmp_path / "b", {**marked(), "chat_template.jinja": "J"}, "tokenizer_config.json")
    assert (ours.chat_template, ours.tool_chat_template) == ("D", "T")
    ours = load(tmp_path / "c", marked(chat_template={"rag": "R"}), "['rag']", 'none named "default"')
    assert ours.chat_template is None
    same = marked()["tokenizer_config.json"]["chat_template"]
    assert load_tokenizer(write(tmp_path / "d", {**marked(), "chat_template.jinja": same + "\n"})).chat_template


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    """As where a token for padding was added and the embedding was not enlarged."""
    files = {**marked(pad_token="[NEW PAD]"), "config.json": {"vocab_size": 272}}
    ours = load_tokenizer(write(tmp_path / "a", files))
    assert ours.encode("[NEW PAD]", parse_special=True) == [272]
    assert (ours.vocab_size, ours.decode([272])) == (273, "[NEW PAD]")
    ours = load(tmp_path / "b", {**marked(), "config.json": {"vocab_size": 271}}, "{271: '<gap>'}", "vocab_size is 271")
    assert ours.encode("<gap>") == [271]

"""The tokenizer against recorded results of transformers 5.23, the published vectors, and the tokenizers library."""

import itertools
import os
import random
from pathlib import Path
from typing import Literal

import pytest
import sentencepiece
import tokenizers
from vocabularies import byte_level_spec, train_sentencepiece, write

from phi3_jax.text import Tokenizer, load_tokenizer

BACKENDS: tuple[Literal["tokenizers", "sentencepiece"], ...] = ("tokenizers", "sentencepiece")
SPACES = [" ", "   ", "\n", "\t", "\r\n", " \n", "\u3000", "\u2028", "\x1c", "\x85", "\u2581", "\u200b"]
ODDITIES = [
    "",
    "é",
    "e\u0301",
    "日本語",
    "\U0001f600",
    "\U0001f469\u200d\U0001f680",
    "\x00",
    "\ufeff",
    "\U0010fffd",
    "<0x0A>",
]


def random_text(rng: random.Random, strings: list[str], highest: int = 0x10FFFF) -> str:
    kinds = [
        lambda: rng.choice(strings),
        lambda: rng.choice(SPACES) * rng.randrange(1, 7),
        lambda: rng.choice("ab=-0.") * rng.randrange(1, 23),
        lambda: rng.choice(ODDITIES),
        lambda: "".join(rng.choice("the catsWORD13579 ,.'") for _ in range(rng.randrange(1, 11))),
        lambda: "".join(chr(c) for c in (rng.randrange(highest + 1) for _ in range(3)) if not 0xD800 <= c < 0xE000),
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(11)))


# ---------------------------------------------------------------- the real Phi-3 vocabulary


@pytest.fixture(scope="module")
def phi3_folder() -> Path:
    folder = os.environ.get("PHI3_TOKENIZER_DIR")
    if not folder:
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    return Path(folder)


@pytest.fixture(scope="module", params=BACKENDS)
def phi3(request: pytest.FixtureRequest, phi3_folder: Path) -> Tokenizer:
    return load_tokenizer(phi3_folder, request.param)


def vectors(folder: Path) -> list[tuple[str, list[int]]]:
    texts = (folder / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "vectors.out").read_text().split("\n")
    pairs = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=False)]
    return [pair for pair in pairs if pair != ("", [])] + [("", [])]


def test_published_vectors(phi3: Tokenizer, phi3_folder: Path) -> None:
    pairs = vectors(phi3_folder)
    assert len(pairs) >= 46
    assert [(text, phi3.encode(text)) for text, _ in pairs] == pairs


# Recorded with AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False).
SPECIAL_CASES = [
    ("<|user|>\nHello<|end|>\n<|assistant|>\n", [32010, 15043, 32007, 32001]),
    ("a<|end|> b", [263, 32007, 289]),
    ("a <|endoftext|> b", [263, 29871, 32000, 29871, 289]),
    ("<s> x", [1, 29871, 921]),
    ("<s>x</s>  x", [1, 921, 2, 921]),
    ("<|user|>", [32010]),
    ("<|user|> \n", [32010]),
    ("x<|user|>\n\n\t y", [921, 32010, 343]),
    ("<|end|>\u3000\u2028x", [32007, 921]),
    ("<|end|>\x1cx", [32007, 29871, 31, 29916]),
    ("<|end|>\u200bx", [32007, 29871, 30166, 29916]),
    (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n 2+2? \n<|end|>\n<|assistant|>\n",
        [32006, 1522, 11473, 29889, 32007, 32010, 29871, 29906, 29974, 29906, 29973, 29871, 13, 32007, 32001],
    ),
    ("<|end|><|end|> <|end|>", [32007, 32007, 32007]),
    ("<|endo<|end|>ftext|>", [529, 29989, 2765, 32007, 285, 726, 29989, 29958]),
    ("<|placeholder1|>é<|placeholder6|> \U0001f600", [32002, 904, 32009, 29871, 243, 162, 155, 131]),
]


@pytest.mark.parametrize(("text", "ids"), SPECIAL_CASES)
def test_special_tokens_as_in_transformers(phi3: Tokenizer, text: str, ids: list[int]) -> None:
    assert phi3.encode(text, parse_special=True) == ids


# Recorded with split_special_tokens=True.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "<|user|>\nHi<|end|>",
            [529, 29989, 1792, 29989, 29958, 13, 18567, 29966, 29989, 355, 29989, 29958],
        ),
        ("<s>a</s>", [529, 29879, 29958, 29874, 829, 29879, 29958]),
        ("<unk>", [529, 2960, 29958]),
    ],
)
def test_typed_text_never_becomes_a_special_token(phi3: Tokenizer, text: str, ids: list[int]) -> None:
    assert phi3.encode(text) == ids


def test_decode_as_in_transformers(phi3: Tokenizer) -> None:
    ids = [32010, 15043, 32007, 1, 29871, 2, 32050, 243, 162, 155, 131, 3, 0, 259, 32000]  # 32050 is an unused row
    assert phi3.decode(ids) == "<|user|> Hello<|end|><s> </s>\U0001f600\x00<unk>  <|endoftext|>"
    assert phi3.decode(ids, skip_special_tokens=True) == "Hello \U0001f600\x00  "


def test_phi3_attributes(phi3: Tokenizer) -> None:
    assert (phi3.bos_id, phi3.bos_token, phi3.eos_id, phi3.eos_token) == (1, "<s>", 32000, "<|endoftext|>")
    assert (phi3.add_bos, phi3.vocab_size) == (False, 32064)
    assert phi3.special_ids == {0, 1, 2, *range(32000, 32011)}
    assert {t.content for t in phi3.added_tokens if not t.rstrip} == {"<unk>", "<s>", "<|endoftext|>"}
    assert phi3.chat_template is not None
    assert phi3.encode("The capital of France is") == [450, 7483, 310, 3444, 338]
    assert phi3.encode("a", add_bos=True) == [1, 263]
    assert phi3.encode("<s>a", parse_special=True, add_bos=True) == [1, 263]
    assert phi3.encode("<s>a", add_bos=True)[:2] == [1, 529]


def test_both_backends_and_the_library_agree_on_random_text(phi3_folder: Path) -> None:
    first, second = (load_tokenizer(phi3_folder, backend) for backend in BACKENDS)
    library = tokenizers.Tokenizer.from_file(str(phi3_folder / "tokenizer.json"))
    rng = random.Random(23)
    strings = [token.content for token in first.added_tokens]
    for parse_special in (True, False):
        library.encode_special_tokens = not parse_special
        for _ in range(701):
            text = random_text(rng, strings)
            ids = library.encode(text, add_special_tokens=False).ids
            assert first.encode(text, parse_special=parse_special) == ids, text
            assert second.encode(text, parse_special=parse_special) == ids, text
            for skip in (True, False):
                want = library.decode(ids, skip_special_tokens=skip)
                assert first.decode(ids, skip_special_tokens=skip) == want
                assert second.decode(ids, skip_special_tokens=skip) == want


def test_skip_special_tokens_round_trip(phi3: Tokenizer, phi3_folder: Path) -> None:
    for text, ids in vectors(phi3_folder):
        if "\u2581" not in text:
            assert phi3.decode([32010, *ids, 32007], skip_special_tokens=True) == text


def streamed(pieces: list[str]) -> str:
    """The text of vocabulary pieces in which complete characters stay what they are, whatever bytes follow."""
    text = ""
    for is_run, group in itertools.groupby(pieces, lambda piece: piece.startswith("<0x")):
        if not is_run:
            text += "".join(group).replace("\u2581", " ")
            continue
        run = bytes(int(piece[3:5], 16) for piece in group)
        try:
            text += run.decode()
        except UnicodeDecodeError as error:
            text += run[: error.start].decode() + "\ufffd" * (len(run) - error.start)
    return text.removeprefix(" ")


def test_streamed_pieces_concatenate_to_the_library_decode(phi3: Tokenizer, phi3_folder: Path) -> None:
    """Except for runs of bytes that are broken after a complete character, which a stream has printed already."""
    library = tokenizers.Tokenizer.from_file(str(phi3_folder / "tokenizer.json"))
    rng, differences = random.Random(29), 0
    for _ in range(1009):
        kinds = [rng.randrange(32064), rng.randrange(3, 259), rng.randrange(3, 131), 29871, 259, 32050, 1, 32007]
        emoji = [b + 3 for b in "\U0001f600".encode()]
        ids = [i for _ in range(rng.randrange(9)) for i in rng.choice([*([kind] for kind in kinds), emoji])]
        for skip in (True, False):
            stream = phi3.stream(skip_special_tokens=skip)
            text = "".join([stream.push(i) for i in ids] + [stream.flush()])
            whole = library.decode(ids, skip_special_tokens=skip)
            assert phi3.decode(ids, skip_special_tokens=skip) == whole, ids
            hidden = phi3.special_ids if skip else ()
            assert text == streamed([piece for i in ids if i not in hidden and (piece := phi3.pieces[i])]), ids
            assert text == whole or "\ufffd" in whole, ids
            differences += text != whole
    assert differences > 0


@pytest.mark.parametrize(
    ("data", "pieces", "rest", "decoded"),
    [
        (b"\n", ["\n"], "", "\n"),
        (b"\r\n\t", ["\r", "\n", "\t"], "", "\r\n\t"),
        ("é\n".encode(), ["", "é", "\n"], "", "é\n"),
        ("\U0001f600".encode(), ["", "", "", "\U0001f600"], "", "\U0001f600"),
        ("\U0001f600".encode()[:3], ["", "", ""], "\ufffd" * 3, "\ufffd" * 3),
        (b"\xff\xfe", ["", ""], "\ufffd" * 2, "\ufffd" * 2),
        (b"\xff\n", ["", ""], "\ufffd" * 2, "\ufffd" * 2),
        (b"\xed\xa0\x80", ["", "", ""], "\ufffd" * 3, "\ufffd" * 3),  # half of a surrogate pair
        (b"\n\xff", ["\n", ""], "\ufffd", "\ufffd" * 2),  # the two that differ
        ("\n\U0001f600".encode()[:4], ["\n", "", "", ""], "\ufffd" * 3, "\ufffd" * 4),
    ],
)
def test_characters_in_byte_tokens_come_with_their_last_byte(
    phi3: Tokenizer, phi3_folder: Path, data: bytes, pieces: list[str], rest: str, decoded: str
) -> None:
    library = tokenizers.Tokenizer.from_file(str(phi3_folder / "tokenizer.json"))
    stream, ids = phi3.stream(), [byte + 3 for byte in data]
    assert [stream.push(i) for i in ids] == pieces
    assert stream.flush() == rest
    assert phi3.decode(ids) == library.decode(ids) == decoded
    # Another token ends the run, and brings what was held back.
    assert [stream.push(i) for i in [*ids, 15043]] == [*pieces, f"{rest} Hello"]


def test_stream_holds_an_emoji_until_it_is_whole(phi3: Tokenizer) -> None:
    stream = phi3.stream()
    ids = [15043, 29871, *(b + 3 for b in "\U0001f600".encode()), 3186]
    assert [stream.push(i) for i in ids] == ["Hello", " ", "", "", "", "\U0001f600", " world"]
    assert stream.flush() == ""


# ---------------------------------------------------------------- small vocabularies made here


def test_added_token_flags_as_in_the_library(tmp_path: Path) -> None:
    spec = byte_level_spec()
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec}))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(31)
    strings = [token.content for token in ours.added_tokens]
    for parse_special in (True, False):
        library.encode_special_tokens = not parse_special
        for _ in range(997):
            # The library lets plain-text special tokens hide others from it; "<s>" is also what merges spell.
            # Newer code points are letters only to the one whose Unicode tables know them.
            text = random_text(rng, strings if parse_special else ["<both>", "word", "<|e"], highest=0x4FF)
            ids = library.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, parse_special=parse_special) == ids, text
            assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False), text
            assert ours.decode(ids, skip_special_tokens=True) == library.decode(ids), text


def test_merges_never_spell_a_special_token(tmp_path: Path) -> None:
    spec = byte_level_spec()
    spec["pre_tokenizer"]["use_regex"] = False  # words would keep "<", "s" and ">" apart
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec}))
    special = ours.encode("<s>", parse_special=True)
    assert len(special) == 1
    assert special[0] not in ours.encode("<s>")
    assert ours.decode(ours.encode("<s>")) == "<s>"


def test_byte_level_stream_as_the_library_decodes(tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": byte_level_spec()}))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(37)
    for _ in range(1013):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(13))]
        for skip in (True, False):
            stream = ours.stream(skip_special_tokens=skip)
            pieces = [stream.push(i) for i in ids] + [stream.flush()]
            assert "".join(pieces) == library.decode(ids, skip_special_tokens=skip), ids
    stream = ours.stream()
    assert [stream.push(i) for i in ours.encode("é!")] == ["", "é", "!"]
    stream.push(ours.encode("é")[0])
    assert stream.flush() == "\ufffd"
    assert stream.push(ours.encode("a")[0]) == "a"  # a flushed stream starts anew


def test_token_bytes(tmp_path: Path) -> None:
    """Joined, they are what decoding writes; the first token loses the space that the decoder drops."""
    text = "the cat sat on the mat\nthe dog sat on the log\n" * 5
    byte_level = load_tokenizer(write(tmp_path / "byte level", {"tokenizer.json": byte_level_spec()}))
    cases = [(byte_level, False)]
    for prefix in (True, False):
        folder = write(tmp_path / f"pieces {prefix}", {})
        train_sentencepiece(folder / "tokenizer", text, vocab_size=290, add_dummy_prefix=prefix)
        cases.append((load_tokenizer(folder), prefix))
    rng = random.Random(31)
    for ours, drops in cases:
        spelled = {i: ours.token_bytes(i) for i in range(ours.vocab_size)}
        opening = {i: ours.token_bytes(i, opens_text=True) for i in spelled}
        assert opening == {i: data.removeprefix(b" ") if drops else data for i, data in spelled.items()}
        assert sum(data.startswith(b" ") for data in spelled.values()) > 1
        for _ in range(211):
            ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(1, 9))]
            joined = opening[ids[0]] + b"".join(spelled[i] for i in ids[1:])
            # How many U+FFFD stand for a broken character is the decoder's affair.
            if "\ufffd" not in (decoded := ours.decode(ids)):
                assert joined.decode() == decoded
    assert byte_level.token_bytes(byte_level.pieces.index("Ã")) == b"\xc3"
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        byte_level.token_bytes(byte_level.vocab_size)


def test_token_bytes_of_phi3(phi3: Tokenizer) -> None:
    spelled = {450: b" The", 13: b"\n", 29871: b" ", 259: b"  ", 198: b"\xc3", 32007: b"<|end|>", 32050: b""}
    assert {i: phi3.token_bytes(i) for i in spelled} == spelled
    opening = {450: b"The", 29871: b"", 259: b" ", 35: b"", 310: b"of"}
    assert {i: phi3.token_bytes(i, opens_text=True) for i in opening} == opening


def test_prefix_space_only_at_the_start_where_the_file_says_so(tmp_path: Path) -> None:
    spec = byte_level_spec("▁", "<unk>")
    spec["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    spec["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    for pre in (metaspace, {"type": "Sequence", "pretokenizers": [metaspace]}):
        spec["pre_tokenizer"] = pre
        ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec}))
        library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in ("a<|end|> b<s> c", "<|end|>a", " <|end|>a"):
            ids = library.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, parse_special=True) == ids
            assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert ours.decode(ours.encode("a")) == " a"
        assert ours.decode(ours.encode("<|ea")) == "<|ea"


def test_settings_in_tokenizer_config(tmp_path: Path) -> None:
    spec = byte_level_spec()
    end = next(entry for entry in spec["added_tokens"] if entry["content"] == "<|end|>")
    new = {"content": "<new>", "special": False}
    config = {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "<new>",
        "add_bos_token": True,
        "added_tokens_decoder": {str(end["id"]): {**end, "rstrip": False}, "268": new},
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec, "tokenizer_config.json": config}))
    assert ours.encode("<|end|> ", parse_special=True) == [end["id"], *ours.encode(" ")]  # the config's flag wins
    assert (ours.bos_token, ours.eos_token, ours.eos_id, ours.chat_template) == ("<s>", "<new>", 268, "D")
    assert 268 in ours.special_ids  # because it is the eos
    assert not ours.add_bos  # tokenizer.json's post-processor decides, and there is none
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    spec["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    with pytest.warns(UserWarning, match=r"chat_template\.jinja is read, as in transformers"):
        ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec, "chat_template.jinja": "J"}))
    assert ours.encode("a")[0] == ours.bos_id
    assert ours.encode("a", add_bos=False) == ours.encode("a")[1:]
    assert ours.chat_template == "J"


def test_sentencepiece_with_the_older_files(tmp_path: Path) -> None:
    text = "the cat sat on the mat\nthe dog sat on the log\n" * 5
    train_sentencepiece(tmp_path / "tokenizer", text, vocab_size=290)
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size()
    bare = load_tokenizer(tmp_path)
    assert bare.special_ids == {0, 1, 2}
    assert (bare.bos_token, bare.eos_token, bare.add_bos, bare.vocab_size) == ("<s>", "</s>", False, size)
    files = {
        "added_tokens.json": {"<|x|>": size, "plain": size + 1},
        "special_tokens_map.json": {"eos_token": {"content": "<|x|>"}},
        "tokenizer_config.json": {"add_bos_token": True},
    }
    ours = load_tokenizer(write(tmp_path, files))
    the, cat = ours.encode("the", add_bos=False), ours.encode("cat", add_bos=False)
    assert ours.encode("the<|x|>cat", parse_special=True) == [1, *the, size, *cat]
    assert ours.encode("theplaincat") == [1, *the, size + 1, *cat]
    assert ours.decode([1, *the, *cat], skip_special_tokens=True) == "the cat"
    assert ours.eos_id == size

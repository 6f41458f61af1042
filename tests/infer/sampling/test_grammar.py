"""Grammars: masks of small vocabularies against brute force, random answers of real ones against what they match."""

import functools
import gc
import json
import math
import random
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from grammars import accepts, allowed
from vocabularies import byte_level_spec, train_sentencepiece, write

from phi3_jax.checkpoint.gguf.tokenizer_reader import tokenizer_from_gguf
from phi3_jax.infer.sampling import Grammar
from phi3_jax.infer.sampling.grammar import GrammarMasks, unpack
from phi3_jax.text import Tokenizer, load_tokenizer

llguidance = pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")


# ---------------------------------------------------------------- small vocabularies, brute force

TEXT = "the cat sat on the mat\nthe other dog then bathed another moth\n" * 5


def small_sentencepiece(folder: Path, **options: Any) -> Tokenizer:
    train_sentencepiece(folder / "tokenizer", TEXT, vocab_size=311, remove_extra_whitespaces=False, **options)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    return load_tokenizer(write(folder, {"added_tokens.json": {"<|x|>": size, "the ": size + 2}}))  # one row is unused


def small_gguf(folder: Path) -> Tokenizer:
    small_sentencepiece(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(processor.get_piece_size())
    kinds = [6 if processor.is_byte(i) else 3 if processor.is_control(i) else 2 if i == 0 else 1 for i in ids]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids] + ["<|end|>", "the ", "[PAD]"],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids] + [0.0] * 3,
        "tokenizer.ggml.token_type": [*kinds, 3, 4, 5],
        "tokenizer.ggml.bos_token_id": 1,
    }
    return tokenizer_from_gguf(metadata, "small.gguf")


def small_byte_level(folder: Path) -> Tokenizer:
    return load_tokenizer(write(folder, {"tokenizer.json": byte_level_spec("Ġcat", "ĠĠ", "at")}))


SMALL: dict[str, tuple[Callable[[Path], Tokenizer], bool]] = {  # and whether a leading space is lost
    "sentencepiece": (small_sentencepiece, True),
    "sentencepiece without prefix": (functools.partial(small_sentencepiece, add_dummy_prefix=False), False),
    "gguf": (small_gguf, True),
    "byte level": (small_byte_level, False),
}
OPTIONS = ["the cat", " the cat", "the", "  the", "théo\U0001f600", "a\n", "", " ", "▁", "</s>", "a/b|c", '"\\d\x7f']


@pytest.mark.parametrize("name", SMALL)
def test_masks_are_those_of_brute_force(tmp_path: Path, name: str) -> None:
    make, loses_space = SMALL[name]
    tokenizer = make(tmp_path)
    vocab_size = tokenizer.vocab_size + 13
    text_end = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b"th", b"he"))
    end_ids = [text_end, 2, tokenizer.vocab_size + 5]
    usable = set(range(tokenizer.vocab_size)) - {token.id for token in tokenizer.added_tokens} - set(end_ids)
    spelled = {i: spelling for i in usable if (spelling := tokenizer.token_bytes(i))}
    rng = random.Random(47)
    finished = set()

    def drop(raw: bytes) -> bytes:
        return raw.removeprefix(b" ") if loses_space else raw

    for options in (OPTIONS, OPTIONS[:2], OPTIONS[1:3], [" "], ["", "a\n"]):
        for _ in range(31):
            masks, ids = GrammarMasks(tokenizer, [Grammar.choice(options)], end_ids, vocab_size), []
            targets = [option.encode() for option in options]
            while True:
                raw = b"".join(spelled[i] for i in ids)
                printed = {i: drop(raw + more) for i, more in spelled.items()}
                can = {i for i, text in printed.items() if any(target.startswith(text) for target in targets)}
                done = drop(raw) in targets
                assert masks.is_complete(0) == done
                assert set(allowed(masks, vocab_size)) == can | (set(end_ids) if done else set()), ids
                token = int(rng.choice(sorted(can) + [end_ids[1]] * 3 * done))
                masks.push(0, token)
                if token in end_ids:
                    break
                ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text in options
            finished.add(text)
    assert len(finished) > 8


def test_an_answer_ends_only_where_it_matches(tmp_path: Path) -> None:
    tokenizer = small_byte_level(tmp_path)
    a, b, c, ends = *(tokenizer.encode(x)[0] for x in "abc"), [301, 7]
    masks = GrammarMasks(tokenizer, [Grammar.regex("ab?"), None, Grammar.regex("ab?")], ends, 302)
    assert allowed(masks, 302).tolist() == [a]
    assert not masks.is_complete(0)
    masks.push(0, a)
    assert sorted(allowed(masks, 302)) == sorted([b, *ends])
    assert (masks.is_complete(0), masks.is_complete(1), masks.is_complete(2)) == (True, True, False)
    masks.push(0, b)
    assert sorted(allowed(masks, 302)) == sorted(ends)
    masks.push(0, ends[1])
    for token in (ends[0], c, 0):
        masks.push(0, token)  # ignored
        assert sorted(allowed(masks, 302)) == sorted(ends)
        assert masks.is_complete(0)
    assert allowed(masks, 302, row=1).tolist() == list(range(302))
    masks.push(1, c)
    assert allowed(masks, 302, row=1).tolist() == list(range(302))
    assert allowed(masks, 302, row=2).tolist() == [a]  # rows of one grammar go their own ways
    with pytest.raises(ValueError, match="row 2: end id 7 before the text matches"):
        masks.push(2, 7)
    masks.push(2, a)
    masks.push(2, 7)
    assert sorted(allowed(masks, 302, row=2)) == sorted(ends)  # no "b" any more


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = small_byte_level(tmp_path)
    whole, size = tokenizer.encode("the")[0], 100
    assert whole >= size
    masks = GrammarMasks(tokenizer, [Grammar.choice(["the"])], [3], size)
    assert masks.masks().shape == (1, 4)
    assert masks.masks().dtype == np.uint32
    assert allowed(masks, 128).tolist() == [tokenizer.pieces.index("t")]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97])
def test_unpack(vocab_size: int) -> None:
    masks = np.random.default_rng(53).integers(0, 2**32, (3, -(-vocab_size // 32)), np.uint32)
    expected = [[bool(row[t // 32] >> np.uint32(t % 32) & 1) for t in range(vocab_size)] for row in masks]
    unpacked = jax.jit(unpack, static_argnums=1)(jnp.asarray(masks), vocab_size)
    assert unpacked.dtype == bool
    assert unpacked.tolist() == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.choice([]), "choice cannot be used: there are no options"),
        (Grammar.json_schema("{"), "json_schema cannot be used: not JSON: Expecting property name"),
        (Grammar.json_schema("[1]"), "json_schema cannot be used: .*must be an object or boolean"),
        (Grammar.json_schema({"type": "strin"}), "Invalid type: strin$"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), r'Unimplemented keys: \["uniqueItems"\]$'),
        (Grammar.json_schema({"x-guidance": 3}), "invalid type: integer `3`"),
        (Grammar.json_schema({"x-guidance": {"nonsense": 3}}), "unknown field `nonsense`"),
        (Grammar.json_schema({"$ref": "https://a.b/c"}), "does not fetch"),
        (Grammar.regex("("), r"regex cannot be used: .*unclosed group$"),
        (Grammar.regex("(yes|no){1,3}[a\nb"), r"regex cannot be used: .*unclosed character class$"),
        (Grammar.regex("a(?=b)"), "look-ahead"),
        (Grammar.regex("a\\"), "lexer error"),
        (Grammar.regex("[a&&b]"), "no token of the vocabulary leads on"),
        (Grammar.regex("\ud800"), "regex cannot be used"),
        (Grammar.choice(["\ud800"]), "choice cannot be used"),
    ],
)
def test_a_wrong_grammar_is_refused_before_anything_runs(tmp_path: Path, grammar: Grammar, message: str) -> None:
    tokenizer = small_byte_level(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        GrammarMasks(tokenizer, [None, grammar], [1], tokenizer.vocab_size)
    assert "row 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "no_forcing" not in str(caught.value) or grammar.source == "\ud800"


def nested(times: int) -> dict:
    schema: dict = {"type": "null"}
    for _ in range(times):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


def test_schemas_are_nested_as_deeply_as_they_may_be_and_no_deeper(tmp_path: Path) -> None:
    tokenizer = small_byte_level(tmp_path)
    for schema in (nested(119), json.dumps(nested(119))):
        masks = GrammarMasks(tokenizer, [Grammar.json_schema(schema)], [1], tokenizer.vocab_size)
        assert unpack(masks.masks(), tokenizer.vocab_size).sum() == 1  # "["
    for schema in (nested(120), json.dumps(nested(120)), nested(5000), "[" * 5000, '{"a":' * 5000):
        with pytest.raises(ValueError, match="the schema is nested more than 120 times; make it flatter"):
            Grammar.json_schema(schema)
    Grammar.json_schema({"pattern": '[[[["' * 200})  # in a text
    with pytest.raises(ValueError, match="the schema has 5000000 characters, more than 4194304"):
        Grammar.json_schema(" " * 5_000_000)
    for kind, text in ((Grammar.regex, "a" * 5_000_000), (Grammar.choice, ["a" * 4_999_996])):
        with pytest.raises(ValueError, match=f"the {kind.__name__} has 5000000 characters, more than 4194304"):
            kind(text)


def test_wrong_arguments(tmp_path: Path) -> None:
    tokenizer, yes = small_byte_level(tmp_path), Grammar.choice(["yes"])
    with pytest.raises(ValueError, match="a list of texts, not 'yes'"):
        Grammar.choice("yes")
    with pytest.raises(ValueError, match="a list of texts"):
        Grammar.choice(["yes", 3])  # type: ignore[list-item]
    for schema in ({"enum": {3}}, {"maximum": math.inf}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            Grammar.json_schema(schema)
    with pytest.raises(ValueError, match="needs a token to end with"):
        GrammarMasks(tokenizer, [yes], [], tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"end ids \[97, -1\] are outside of the vocabulary of 97"):
        GrammarMasks(tokenizer, [None], [97, 5, -1], 97)


def test_a_token_that_the_mask_forbids_is_an_error(tmp_path: Path) -> None:
    tokenizer = small_sentencepiece(tmp_path)
    size = tokenizer.vocab_size
    unused = tokenizer.pieces.index(None)
    for token in (1, unused, size - 1, size, size + 3, -1):
        masks = GrammarMasks(tokenizer, [Grammar.regex("(?s).*")], [2], size + 5)
        with pytest.raises(ValueError, match=f"row 0: token {token} is not text"):
            masks.push(0, token)
    masks = GrammarMasks(tokenizer, [Grammar.choice(["the"])], [2], size)
    with pytest.raises(ValueError, match=r"does not fit the grammar: Parser Error.*'c'"):
        masks.push(0, tokenizer.pieces.index("c"))
    for question in (masks.masks, lambda: masks.is_complete(0)):
        with pytest.raises(ValueError, match="row 0: llguidance cannot follow the grammar further: Parser Error"):
            question()


def test_a_dead_end_is_an_error(tmp_path: Path) -> None:
    tokenizer = small_byte_level(tmp_path)
    b = tokenizer.encode("b")[0]
    with pytest.raises(ValueError, match="row 0: no token that may be used leads on"):
        GrammarMasks(tokenizer, [Grammar.choice(["b"])], [b], tokenizer.vocab_size)
    masks = GrammarMasks(tokenizer, [Grammar.choice(["ab"])], [b], tokenizer.vocab_size)
    masks.push(0, tokenizer.encode("a")[0])
    with pytest.raises(ValueError, match="row 0: no token that may be used leads on"):
        masks.masks()


def test_limits_of_llguidance_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = functools.partial(llguidance.LLParserLimits, step_lexer_fuel=5_000, precompute_large_lexemes=False)
    monkeypatch.setattr(llguidance, "LLParserLimits", limited)
    tokenizer = small_byte_level(tmp_path)
    rng = random.Random(59)

    def run() -> None:
        masks = GrammarMasks(tokenizer, [Grammar.regex("([a-d]*a[a-d]{40}[ab]|[^z]{50}b)*z")], [1], 300)
        for _ in range(200):
            masks.push(0, tokenizer.encode(rng.choice("abcd"))[0])
            masks.masks()

    with pytest.raises(ValueError, match=r"row 0: llguidance cannot follow the grammar further: .*too many"):
        run()


def test_warnings_of_llguidance_are_warnings(tmp_path: Path) -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.warns(UserWarning, match=r'grammar of row 0: Unimplemented keys: \["uniqueItems"\]'):
        GrammarMasks(small_byte_level(tmp_path), [Grammar.json_schema(schema)], [1], 300)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = small_byte_level(tmp_path)
    assert GrammarMasks(tokenizer, [None, None], [], 97).masks().tolist() == [[2**32 - 1] * 4] * 2
    with pytest.raises(ImportError, match=r"pip install 'phi3_jax\[grammar\]'"):
        GrammarMasks(tokenizer, [Grammar.choice(["a"])], [1], 97)


def test_a_grammar_is_compiled_once_and_every_answer_begins_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    original = llguidance.LLMatcher
    monkeypatch.setattr(llguidance, "LLMatcher", lambda *args, **more: compiled.append(1) or original(*args, **more))
    tokenizer = small_byte_level(tmp_path)
    a, b = tokenizer.encode("ab")
    for _ in range(3):
        masks = GrammarMasks(tokenizer, [Grammar.choice(["ab"])], [1], 300)
        assert [masks.masks()[0, token // 32] >> (token % 32) & 1 for token in (a, b)] == [1, 0]
        masks.push(0, a)
        masks.push(0, b)
        assert masks.is_complete(0)
    assert len(compiled) == 1
    for word in [*"cdefghijklmnopqrs", "ab"]:  # so many are not kept
        GrammarMasks(tokenizer, [Grammar.choice([word])], [1], 300)
    assert len(compiled) == 19


def test_the_vocabulary_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = llguidance.LLTokenizer
    monkeypatch.setattr(llguidance, "LLTokenizer", lambda wrapper: built.append(1) or original(wrapper))
    tokenizer = small_byte_level(tmp_path)
    for word in ("a", "b", "a"):
        GrammarMasks(tokenizer, [Grammar.choice([word])] * 2, [1], 300)
    assert len(built) == 1
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------- what is accepted


PATTERNS = [
    "a|bc",
    "^(a|bc)$",
    r"\d{2,3}-[A-F]+",
    "a/b",
    r"a\/b",
    "[/]+",
    r"\\/x",
    "one\ntwo",
    "(?x) a # one\n  /b",
    "(?i)yes",
    "a*?b",
    "",
    "[^x]é",
    "(?s).",
    ".",
    r'"\w+"',
    "#|//",
]
TEXTS = [
    *(
        "",
        "a",
        "bc",
        "abc",
        "12-A",
        "123-FA",
        "1234-F",
        "a/b",
        "/",
        "//",
        "a\\/b",
        "\\/x",
        "one\ntwo",
        "YeS",
        "b",
        "aab",
    ),
    *("aabb", "aé", "xé", "\n", "é", '"w_1"', '"é"', '"a b"', "#", " a", "a "),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_whole_answer_as_in_python(tmp_path: Path, pattern: str) -> None:
    tokenizer = small_byte_level(tmp_path)
    ours = {text for text in TEXTS if accepts(tokenizer, Grammar.regex(pattern), text, 300)}
    assert ours == {text for text in TEXTS if re.fullmatch(pattern, text)}
    assert ours


def test_json_has_bounded_white_space_and_the_schemas_order(tmp_path: Path) -> None:
    tokenizer = small_byte_level(tmp_path)
    schema = {
        "type": "object",
        "properties": {"b": {"type": "integer"}, "a": {"type": "array", "items": {"type": "integer"}}},
        "required": ["b", "a"],
        "additionalProperties": False,
    }
    good = ['{"b":1,"a":[2,3]}', '{"b": 1, "a": [2, 3]}', '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}']
    bad = ['{"b":  1,"a":[]}', '{"b":\t1,"a":[]}', '{"b":1,\n\n"a":[]}', ' {"b":1,"a":[]}', '{"b":1,"a":[]} ']
    bad += ['{"a":[],"b":1}', '{"b":1}', '{"b":1,"a":[],"c":1}', '{"b":1.5,"a":[]}', '{"b":1,"a":[]', "{'b':1,'a':[]}"]
    for grammar in (Grammar.json_schema(schema), Grammar.json_schema(json.dumps(schema))):
        assert [text for text in good + bad if accepts(tokenizer, grammar, text, 300)] == good
    compact = Grammar.json_schema(schema | {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}})
    assert [text for text in good + bad if accepts(tokenizer, compact, text, 300)] == good[:1]
    for anything in ("true", "{}"):
        assert accepts(tokenizer, Grammar.json_schema(anything), '[{"x": null}, -1.5e3]', 300)
        assert not accepts(tokenizer, Grammar.json_schema(anything), "[1,  2]", 300)

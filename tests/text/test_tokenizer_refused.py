"""Tokenizer files that cannot be used, and arguments that make no sense."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from vocabularies import byte_level_spec, write

from phi3_jax.text import load_tokenizer


def test_errors_of_use(tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": byte_level_spec()}))
    for token_id in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"Token id {token_id} is outside of the vocabulary"):
            ours.decode([token_id])
    with pytest.raises(ValueError, match="names no bos token"):
        ours.encode("a", add_bos=True)
    with pytest.raises(ValueError, match="lone surrogates"):
        ours.encode("a\ud800")
    for array in (np.asarray, jnp.asarray):
        assert ours.decode(array(ours.encode("the")), skip_special_tokens=True) == "the"


def test_errors_of_loading(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    write(tmp_path, {"tokenizer.json": byte_level_spec()})
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path, "sentencepiece")
    with pytest.raises(ValueError, match="Unknown tokenizer backend 'spm'"):
        load_tokenizer(tmp_path, "spm")  # type: ignore[arg-type]
    write(tmp_path, {"tokenizer.model": "not a model"})
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path, "sentencepiece")


def broken(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    spec: dict[str, Any] = byte_level_spec()
    *parents, last = path
    node = spec
    for key in parents:
        node = node[key]
    node[last] = value
    return spec


def frame(name: str, token_id: Any) -> dict[str, Any]:
    """A post-processor with a token in front, whose id it gives unless that is None."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {} if token_id is None else {name: {"id": name, "ids": [token_id], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


def named(name: Any) -> dict[str, Any]:
    return {"name": name, "template": "{{ messages }}"}


@pytest.mark.parametrize("kind", ["pre_tokenizer", "normalizer"])
def test_expressions_that_the_library_panics_of(kind: str, tmp_path: Path) -> None:
    pattern = {"pattern": {"Regex": "(a+)+$"}}
    split = {"type": "Split", **pattern, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "z"}
    spec = broken((kind,), {"pre_tokenizer": split, "normalizer": replace}[kind])
    ours = load_tokenizer(write(tmp_path, {"tokenizer.json": spec}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizers library refuses it \("):
        ours.encode({"pre_tokenizer": "a" * 30 + "b", "normalizer": "yyy"}[kind])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": '{"model": '}, r"tokenizer\.json: not valid JSON"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json: holds a list"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not valid JSON"),
        ({"tokenizer.json": broken(("model", "type"), "Unigram")}, "no BPE model"),
        ({"tokenizer.json": broken(("model", "merges"), [["zz", "yy"]])}, "the tokenizers library refuses it"),
        ({"tokenizer.json": broken(("decoder",), {"type": "WordPiece"})}, "unsupported decoder"),
        ({"tokenizer.json": broken(("added_tokens",), [{"id": 5}])}, r"added_tokens\[0\] is {'id': 5}, and must be"),
        ({"tokenizer.json": broken(("model", "vocab", "gap"), 264)}, "has id 264, which is 'gap'"),
        ({"config.json": {"vocab_size": 200}}, "lie outside of the vocabulary of 200 ids"),
        ({"tokenizer.json": broken(("post_processor",), {"type": "Unheard"})}, "unsupported post_processor"),
        ({"tokenizer_config.json": {"eos_token": 7}}, "eos_token is 7"),
        (
            {"tokenizer.json": broken(("model", "vocab", "far"), 10**9)},
            r"model\.vocab\['far'\] is 1000000000, and must",
        ),
        ({"tokenizer.json": broken(("model", "vocab", "far"), -1)}, r"model\.vocab\['far'\] is -1, and must"),
        ({"tokenizer.json": broken(("model", "vocab", "far"), 5.0)}, r"model\.vocab\['far'\] is 5\.0, and must"),
        ({"tokenizer.json": broken(("model", "vocab", "far"), 5)}, "the strings '&' and 'far' have one id, 5"),
        ({"tokenizer.json": broken(("model", "merges"), [["a", "b"], ["c"]])}, r"model\.merges\[1\] is \['c'\]"),
        ({"tokenizer.json": broken(("model", "merges"), ["a b c"])}, r"model\.merges\[0\] is 'a b c', and must be two"),
        ({"tokenizer.json": broken(("added_tokens",), {})}, r"added_tokens is {}, and must be a list"),
        (
            {"tokenizer.json": broken(("added_tokens",), [{"id": 10**9, "content": "x"}])},
            r"added_tokens\[0\]\.id is 1000",
        ),
        (
            {"tokenizer.json": broken(("added_tokens",), [{"id": 9, "content": "x", "special": 1}])},
            r"\.special is 1, and",
        ),
        ({"tokenizer.json": broken(("added_tokens",), [{"id": 9, "content": "x" * 1025}])}, "has 1025 characters"),
        ({"tokenizer.json": broken(("post_processor",), frame("<s>", 10**9))}, "post_processor has the id 1000000000"),
        ({"tokenizer.json": broken(("post_processor",), frame("<s>", "1"))}, "post_processor has the id '1'"),
        ({"tokenizer.json": broken(("post_processor",), frame("<none>", None))}, "names '<none>', which is no token"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"1_0": {"content": "x"}}}},
            "'1_0'.: the key must be an id",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {str(10**8): {"content": "x"}}}}, "the key must be an id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": "x"}}}, r"added_tokens_decoder\['9'\] is 'x', and"),
        ({"tokenizer_config.json": {"extra_special_tokens": 3}}, "extra_special_tokens is 3, and must be a list"),
        ({"tokenizer_config.json": {"extra_special_tokens": [3]}}, r"extra_special_tokens\[0\] is 3; make it a string"),
        ({"tokenizer_config.json": {"add_bos_token": "no"}}, "add_bos_token is 'no', and must be true or false"),
        ({"special_tokens_map.json": {"bos_token": ["<s>"]}}, r"special_tokens_map\.json: bos_token is \['<s>'\]"),
        ({"added_tokens.json": {"x": 10**9}}, r"added_tokens\.json: the object\['x'\] is 1000000000, and must"),
        ({"config.json": {"vocab_size": 8 * 10**9}}, r"config\.json: vocab_size is 8000000000, and must be"),
        ({"config.json": {"vocab_size": "300"}}, r"config\.json: vocab_size is '300', and must be"),
        (
            {"tokenizer_config.json": {"chat_template": [named("default"), named("default")]}},
            "another template named 'def",
        ),
        ({"tokenizer_config.json": {"chat_template": [named(3)]}}, r"chat_template\[0\]: the name 3 is a int"),
        ({"tokenizer_config.json": {"chat_template": [named("a"), "b"]}}, r"chat_template\[1\] is 'b'; make it"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template 'default' is a int; make it a string"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*as in transformers")
def test_errors_in_files(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, {"tokenizer.json": byte_level_spec(), **files}))

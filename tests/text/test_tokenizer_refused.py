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
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template 'default' is a int; make it a string"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*as in transformers")
def test_errors_in_files(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, {"tokenizer.json": byte_level_spec(), **files}))

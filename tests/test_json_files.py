"""JSON that lies: every reader refuses it in one line that names the file, and reads the rest as Python does."""

import dataclasses
import json
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from adapters import RECORDED
from vocabularies import byte_level_spec, write

import phi3_jax
from phi3_jax import json_files
from phi3_jax.checkpoint.peft.patterns import Steps
from phi3_jax.checkpoint.peft.settings import read_settings
from phi3_jax.checkpoint.peft.trained_on import warn_of_others
from phi3_jax.infer.conversation import load_messages
from phi3_jax.infer.programs import flags
from phi3_jax.infer.serving.batch.requests import parse_object
from phi3_jax.model.decoder import rms_norm
from phi3_jax.model.rope import inverse_frequencies
from phi3_jax.text import load_tokenizer
from phi3_jax.train.run.exports import exported_step

TINY = {
    "model_type": "phi3", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "pad_token_id": 3, "eos_token_id": 2,
}  # fmt: skip
LIES: dict[str, tuple[str | bytes, str]] = {
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
    "NaN": ('{"a": NaN}', "NaN is not a finite number"),
    "infinity": ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
    "a float beyond float64": ('{"a": 1e999}', "1e999 is not a finite number"),
    "65 bits": (f'{{"a": {2**64}}}', "the number 18446744073709551616... of 20 characters does not fit into 64 bits"),
    "400 digits": ('{"a": 1' + 400 * "0" + "}", "of 401 characters does not fit into 64 bits"),
    "5000 digits": ('{"a": -1' + 5000 * "0" + "}", "of 5002 characters does not fit into 64 bits"),
    "lists without end": ('{"a": ' + 100_000 * "[", "nested too deeply"),
    "one level too many": ('{"a": ' + "[" * 128 + "]" * 128 + "}", "nested too deeply, in more than 128"),
    "deep objects": ('{"a": ' * 300 + "1" + "}" * 300, "nested too deeply, in more than 128"),
    "many": ('{"a": [' + "[]," * 1_000_001 + "[]]}", "more than 1000000 lists and objects"),
    "half a pair": ('{"a": {"b\\ud800": 1}}', "half of a surrogate pair"),
    "half a pair, spelled otherwise": ('{"a": "\\uDC00"}', "half of a surrogate pair"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "written in UTF-16; save it in UTF-8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-be"), "written in UTF-16; save it in UTF-8"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "written in UTF-32; save it in UTF-8"),
    "Latin-1": ('{"é": 1}'.encode("latin-1"), "not UTF-8 at byte 3"),
    "no end": ('{"a":\n 1', "not JSON: Expecting ',' delimiter at line 2, column 3"),
    "nothing": ("", "not JSON: Expecting value at column 1"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: phi3_jax.load(path.parent),
    "generation_config.json": lambda path: phi3_jax.load(write(path.parent, {"config.json": TINY})),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer_config.json": lambda path: load_tokenizer(write(path.parent, {"tokenizer.json": byte_level_spec()})),
    "special_tokens_map.json": lambda path: load_tokenizer(write(path.parent, {"tokenizer.json": byte_level_spec()})),
    "added_tokens.json": lambda path: load_tokenizer(write(path.parent, {"tokenizer.json": byte_level_spec()})),
    "adapter_config.json": read_settings,
    "chat.json": load_messages,
    "tools.json": lambda path: flags._read_tools(str(path)),
    "schema.json": lambda path: flags._read_schema(str(path)),
}
WIDE = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens")  # wide numbers are floats there


@pytest.mark.parametrize("lie", LIES)
def test_every_reader_refuses_in_one_line(lie: str, tmp_path: Path) -> None:
    content, reason = LIES[lie]
    data = content if isinstance(content, bytes) else content.encode()
    for at, (name, read) in enumerate(READERS.items()):
        if name.startswith(WIDE) and lie in ("65 bits", "400 digits", "5000 digits"):
            continue
        path = tmp_path / str(at) / name
        path.parent.mkdir()
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(reason)) as caught:
            read(path)
        told = str(caught.value)
        assert told.startswith(f"{path}: ")
        assert "\n" not in told
        assert len(told) < 400
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_object(data)


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    for at, (name, read) in enumerate(READERS.items()):
        for kind, make in {"a named pipe": os.mkfifo, "a folder": os.mkdir}.items():
            path = tmp_path / f"{at}{kind}" / name
            path.parent.mkdir()
            make(path)
            with pytest.raises(ValueError, match=f"{name}: is {kind}"):
                read(path)
    os.mkfifo(tmp_path / "trained_on.json")
    os.mkfifo(tmp_path / "step.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_others(tmp_path / "adapter_config.json", "")  # an adapter is no worse for a damaged note
    assert exported_step(tmp_path) is None


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a file of holes
    with pytest.raises(ValueError, match=r"config\.json: larger than 16777216 bytes"):
        phi3_jax.load(tmp_path)


def test_a_key_that_is_there_twice_is_found_at_once_among_many() -> None:
    text = "{" + "".join(f'"{i}":0,' for i in range(200_000)) + '"199999":0}'
    begin = time.process_time()
    with pytest.raises(ValueError, match="the key '199999' is there twice"):
        json_files.parse(text)
    assert time.process_time() - begin < 5  # where each is compared with each, minutes


def test_good_json_means_what_it_means_to_python() -> None:
    texts = [
        '{"a": [1, -2.5e-3, true, null, "\\ud83d\\ude42 é"], "": {}}', "[]", "3", f"[{2**64 - 1}, {-(2**63)}, 0.1]",
        '"x"', "[" * 128 + "]" * 128,
    ]  # fmt: skip
    for text in texts:
        for data in (text, text.encode(), b"\xef\xbb\xbf" + text.encode()):
            assert json_files.parse(data) == json.loads(text)
            assert json_files.parse(data, wide=True) == json.loads(text)
    wide = json_files.parse('{"model_max_length": 1000000000000000019884624838656, "id": 12}', wide=True)
    assert wide == {"model_max_length": 1e30, "id": 12}
    assert isinstance(wide["model_max_length"], float)
    with pytest.raises(ValueError, match="is not a finite number"):
        json_files.parse("1" + 400 * "0", wide=True)


CONFIG_LIES: list[tuple[str, Any, str]] = [
    ("rms_norm_eps", 1e39, "must be a positive number that float32 holds"),
    ("rms_norm_eps", 1e-46, "must be a positive number that float32 holds"),
    ("rope_theta", 1e39, "must be a positive number that float32 holds"),
    ("rope_theta", True, "must be a positive number that float32 holds"),
    ("rope_theta", 1e-37, "angles that are no numbers in float32"),
    ("rope_theta", [10000], "must be a positive number"),
    ("partial_rotary_factor", 1e39, "must be a positive number that float32 holds"),
    ("initializer_range", 1e39, "must be a positive number that float32 holds"),
    ("sliding_window", 2**63, "must be a positive integer below 2**31 or null"),
    ("max_position_embeddings", 2**31, "must be a positive integer below 2**31"),
    ("num_hidden_layers", 1e9, "must be a positive integer below 2**31"),
    ("hidden_size", True, "must be a positive integer below 2**31"),
    ("model_type", ["phi3"], "model_type is ['phi3']"),
    ("rope_scaling", [], "must be a dictionary or null, not []"),
    ("rope_scaling", "longrope", "must be a dictionary or null"),
    ("rope_scaling", {"type": "longrope", "short_factor": [1e39] * 4, "long_factor": [1] * 4}, "float32 holds"),
    ("rope_scaling", {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1e-46] * 4}, "float32 holds"),
    ("rope_scaling", {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4, "factor": 1e39}, "factor"),
    ("rope_scaling", {"type": "longrope", "short_factor": [3e38] * 4, "long_factor": [1] * 4}, "no numbers in float32"),
    ("hidden_sizes", 24, "did you mean hidden_size?"),
    ("layer_types", "y" * 1000, "is not supported"),
]


@pytest.mark.parametrize(("key", "value", "reason"), CONFIG_LIES)
def test_settings_that_no_model_has(key: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        phi3_jax.Phi3Config.from_hf(TINY | {key: value}, "my/config.json")
    told = str(caught.value)
    assert told.startswith("my/config.json: ")
    assert "\n" not in told
    assert len(told) < 500


def test_whole_numbers_stand_for_floats() -> None:
    config = phi3_jax.Phi3Config.from_hf(TINY | {"rms_norm_eps": 8_000_000_000, "rope_theta": 10**20})
    assert rms_norm(jnp.ones(3), jnp.ones(3), config.rms_norm_eps)[0] == pytest.approx(8e9**-0.5)
    assert inverse_frequencies(config)[0][1] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_alpha": 1e39}, "alpha must be a number from 0 to below inf that float32 holds, not 1e.39"),
        ({"lora_alpha": True}, "alpha must be a number"),
        ({"r": 2**40}, "rank of an adapter must be a whole number"),
        ({"use_dora": "no"}, "use_dora='no' must be true or false"),
        ({"use_rslora": 1}, "use_rslora=1 must be true or false"),
        ({"modules_to_save": ""}, "modules_to_save='' must be a list of names"),
        ({"exclude_modules": 0}, "exclude_modules=0 must be a list of names"),
        ({"rank_pattern": []}, r"rank_pattern=\[\] must map names to numbers"),
        ({"base_model_name_or_path": ["x"]}, "must be a string"),
        ({"trainable_token_indices": [3, 3]}, "must be a list of token ids"),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"target_modules": ["o_proj"] * 10_001}, "target_modules lists 10001 names, more than 10000"),
        ({"use_dorra": True}, "use_dorra=True is not computed here; .*did you mean use_dora"),
    ],
)
def test_settings_that_no_adapter_has(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings = json.loads((RECORDED / "lora" / "adapter_config.json").read_text())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{reason}"):
        read_settings(path)


def test_many_patterns_do_not_take_for_ever(tmp_path: Path) -> None:
    settings = json.loads((RECORDED / "lora" / "adapter_config.json").read_text())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(settings | {"rank_pattern": {f"(\\w*\\.?)*(x|y)*{i}(a*b*)*": 3 for i in range(9000)}}))
    found = dataclasses.replace(read_settings(path), steps=Steps(100_000))
    with pytest.raises(ValueError, match=r"adapter_config\.json: .* take too long to match"):
        found.of("model.layers.0.self_attn.o_proj")

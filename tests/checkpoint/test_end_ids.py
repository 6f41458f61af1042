"""Which ids end an answer: the same rule for folders and GGUF files, and all that training teaches is among them."""

import dataclasses
import json
from pathlib import Path

import pytest
from vocabularies import byte_level_spec, write

import phi3_jax
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.text import encode_answers, end_ids, load_tokenizer
from phi3_jax.text.templates import process

TURNS = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</turn>\n{% endfor %}"
NO_END = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}\n{% endfor %}"
S, EOS, TURN, IM_END, OTHER = range(263, 268)


def files(template: str = TURNS, **settings) -> dict:
    spec = byte_level_spec()
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    names = ["[s]", "</s>", "</turn>", "<|im_end|>", "<other>"]
    spec["added_tokens"] = [{"id": S + i, "content": c, **blank} for i, c in enumerate(names)]
    config = {"bos_token": "[s]", "eos_token": "</s>", "chat_template": template, **settings}
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


@pytest.fixture
def folder(tiny: phi3_jax.Checkpoint, tmp_path: Path) -> Path:
    """config.json names <other>, and generation_config.json is missing."""
    config = dataclasses.replace(
        tiny.config, vocab_size=270, hidden_size=48, num_hidden_layers=1, eos_token_id=(OTHER,)
    )
    whole = dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(whole, tmp_path / "x")
    (tmp_path / "x" / "generation_config.json").unlink()
    return write(tmp_path / "x", files())


def test_the_tokenizers_eos_ends_answers_too(folder: Path) -> None:
    """Before, only <other> did, and answers ran into the next turn."""
    loaded = phi3_jax.load(folder)
    assert loaded.generation.eos_token_ids == (OTHER, EOS, TURN, IM_END)
    assert phi3_jax.load(write(folder, files(NO_END))).generation.eos_token_ids == (OTHER, EOS, IM_END)
    assert phi3_jax.load(write(folder, files(eos_token=None))).generation.eos_token_ids == (OTHER, TURN, IM_END)


def test_all_that_training_teaches_ends_answers(folder: Path) -> None:
    loaded = phi3_jax.load(folder)
    ids, spans = encode_answers(
        loaded.tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert ids[spans[0][1] - 1] == TURN
    assert {TURN, loaded.tokenizer.eos_id} <= set(loaded.generation.eos_token_ids)


def test_a_gguf_file_and_a_saved_folder_end_answers_alike(folder: Path, tmp_path: Path) -> None:
    write(folder / "additional_chat_templates", {"tool_use.jinja": "T", "default.jinja": TURNS})
    loaded = phi3_jax.load(folder)
    save_gguf(loaded, tmp_path / "x.gguf", "f32")
    gguf = phi3_jax.load(tmp_path / "x.gguf")
    assert set(gguf.generation.eos_token_ids) == set(loaded.generation.eos_token_ids)
    phi3_jax.save(loaded, tmp_path / "again")
    again = phi3_jax.load(tmp_path / "again")
    assert again.generation == loaded.generation
    assert (again.tokenizer.chat_template, again.tokenizer.tool_chat_template) == (TURNS, "T")


def test_generation_config_comes_before_config(folder: Path) -> None:
    """As in transformers; config.json's ids are named where they would be lost."""
    settings = folder / "generation_config.json"
    settings.write_text("\ufeff" + json.dumps({"eos_token_id": [OTHER, 5]}), encoding="utf-8")
    assert phi3_jax.load(folder).generation.eos_token_ids == (OTHER, 5, EOS, TURN, IM_END)
    settings.write_text(json.dumps({"eos_token_id": EOS}))
    with pytest.warns(UserWarning, match=rf"generation_config\.json as in transformers, .*\[{OTHER}\] of config\.json"):
        assert phi3_jax.load(folder).generation.eos_token_ids == (EOS, TURN, IM_END)
    settings.write_text(json.dumps({"eos_token_id": [OTHER, 400]}))
    with pytest.warns(UserWarning, match=r"eos_token_id \[400\] can never end an answer: vocab_size is 270"):
        assert phi3_jax.load(folder).generation.eos_token_ids == (OTHER, EOS, TURN, IM_END)


def test_each_id_once_and_without_a_tokenizer(folder: Path) -> None:
    assert end_ids([7, 5, 7], None) == (7, 5)
    assert end_ids([EOS, TURN, EOS], load_tokenizer(folder)) == (EOS, TURN, IM_END)


def test_without_a_process_for_templates_the_settings_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only continues texts loads all the same."""
    monkeypatch.setattr("sys.executable", "")
    process.end()
    tokenizer = load_tokenizer(write(tmp_path, files()))
    with pytest.warns(UserWarning, match="is taken from the settings alone, for the process .* cannot be started"):
        assert set(end_ids([OTHER], tokenizer)) == {OTHER, EOS, IM_END}

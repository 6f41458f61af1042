"""Settings that are refused before anything is loaded: the message names the setting, and what it contradicts."""

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import flax.traverse_util
import numpy as np
import pytest
from hub import serve
from training_runs import write_run

import phi3_jax
from phi3_jax.checkpoint import read_config
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.model import parameter_shapes
from phi3_jax.train import sharding, values
from phi3_jax.train.checks import check_sizes, check_together
from phi3_jax.train.run.loop import train
from phi3_jax.train.settings import Settings, change

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 0, f"{name}=0: must be at least 1") for name in ("batch_size", "accumulation", "lora_rank")),
        *(
            (name, 0, f"{name}=0: must be at least 1")
            for name in ("log_every", "eval_every", "save_every", "keep_last")
        ),
        *((name, 0.0, f"{name}=0.0: must be above 0") for name in ("lr", "epsilon", "dpo_beta", "lora_alpha")),
        *(
            (name, 1.0, f"{name}=1.0: must be at least 0 and below 1")
            for name in ("beta1", "beta2", "label_smoothing", "lora_dropout", "eval_fraction")
        ),
        *((name, 1.5, f"{name}=1.5: must be at least 0 and at most 1") for name in ("final_lr", "z_loss")),
        *((name, -0.1, f"{name}=-0.1: must be at least 0") for name in ("weight_decay", "clip_norm", "neftune_alpha")),
        *((name, -1, f"{name}=-1: must be at least 0") for name in ("warmup_steps", "patience", "seed", "eval_rows")),
        *(
            (name, 10**9, f"{name}=1000000000: must be at least 1 and at most 65536")
            for name in ("batch_size", "accumulation")
        ),
        ("sequence_length", 1, "sequence_length=1: must be at least 2"),
        ("mixture", (1.0, 0.0), "mixture=0.0: must be at least 0.001"),
        # what a step would make of them
        ("lr", 1e-50, "lr=1e-50: must be above 0 in float32"),
        ("beta2", 1 - 1e-9, "beta2=0.999999999: must be at least 0 and below 1 in float32"),
        ("weight_decay", -0.0, "weight_decay=-0.0: must be at least 0"),
        *(("lr", each, f"lr={each}: must be") for each in (NAN, INF, -INF)),
        ("lr", 10**300, r"lr=10*\.\.\.: must be at most 3.4e\+38"),
        ("seed", 2**31, "seed=2147483648: must be at most 2147483647"),
        # types
        ("lr", "1e-4", "lr='1e-4': must be a number, not of type str"),
        ("lr", True, "lr=True: must be a number, not of type bool"),
        ("steps", True, "steps=True: must be a whole number, not of type bool"),
        ("steps", 100.0, "steps=100.0: must be a whole number, not of type float"),
        ("steps", None, "steps=None: must be a whole number"),
        ("pack", 1, "pack=1: must be True or False, not of type int"),
        ("pack", "false", "pack='false': must be True or False, not of type str"),
        ("output", 3, "output=3: must be a text"),
        ("output", " ", "output: must not be empty"),
        ("lora_targets", "qkv_proj", r"lora_targets='qkv_proj': must be a tuple, such as \('a',\), not of type str"),
        ("lora_targets", ["qkv_proj"], "must be a tuple"),
        ("lora_targets", (), "lora_targets: must not be empty"),
        ("lora_targets", ("o_proj", "o_proj"), "names one of them twice"),
        ("mixture", 2.0, r"mixture=2.0: must be a tuple, such as \(1.0,\)"),
        ("mixture", ("2",), "mixture='2': must be a number"),
        # names
        ("lora_targets", ("qkv_porj",), r"there is no 'qkv_porj', only qkv_proj, .*; did you mean qkv_proj\?"),
        ("trackers", ("wnadb",), r"there is no 'wnadb', only csv, wandb, mlflow; did you mean wandb\?"),
        ("optimizer", "adam", r"optimizer='adam': must be one of adamw, .*; did you mean adamw\?"),
        ("train", ["lora"], r"train=\['lora'\]: must be one of all, lora$"),
        ("quantize", "int4-mixd", r"quantize=int4-mixd: there is no .*; did you mean int4-mixed\?"),
        ("quantize", "int4-g48", "quantize=int4-g48: there is no quantisation"),
    ],
)
def test_a_value(name, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


def test_a_number_that_python_does_not_spell():
    for kind in ("steps", "lr"):
        with pytest.raises(ValueError, match=f"^{kind}=a number of thousands of digits: must be at most"):
            Settings(**{kind: 10**5000})
        with pytest.raises(ValueError, match=rf"^{kind}=-10*\.\.\.: must be (at least|above) 0$"):
            Settings(**{kind: -(10**400)})


def test_the_rows_of_a_step_are_bounded():
    Settings(batch_size=256, accumulation=256)
    with pytest.raises(ValueError, match="batch_size=256, accumulation=257: a step has at most 65536 rows"):
        Settings(batch_size=256, accumulation=257)


def test_values_that_are_allowed():
    for changes in ({"lora_alpha": 32}, {"beta1": 0.0}, {"quantize": "int4-g64-asymmetric"}, {"mixture": (1, 0.5)}):
        Settings(**changes)
    Settings(lr=float(np.float64(3e-4)), seed=2**31 - 1, lora_dropout=0.999, trackers=("csv",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate=1", r"there is no setting learning_rate; did you mean lr\?; phi3-train --help"),
        ("per-device-train-batch-size=1", r"did you mean batch_size\?"),
        ("lora_rnk=3", r"did you mean lora_rank\?"),
        (" lr =fast", "^lr=fast: must be a number"),
        ("Sequence_Length=3", r"did you mean sequence_length\?"),
        ("zzz=1", r"there is no setting zzz; phi3"),
        ("steps", r"--set steps: give a value, too: --set steps=VALUE"),
        ("pack=no", "pack=no: must be true or false"),
        ("steps=1e2", "steps=1e2: must be a whole number"),
        ("lr=fast", "lr=fast: must be a number"),
        ("mixture=1,,2", "mixture=: must be a number"),
        ("lora_targets=o_proj,down_prj", r"did you mean down_proj\?"),
    ],
)
def test_what_set_says(text, message):
    with pytest.raises(ValueError, match=message):
        change(Settings(), [text])


def test_what_set_changes():
    changed = change(Settings(), ["lr=2e-3", "lora_targets=o_proj, down_proj", "mixture=", "output=a=b", "pack=False"])
    assert changed == Settings(lr=2e-3, lora_targets=("o_proj", "down_proj"), output="a=b", pack=False)
    with pytest.raises(ValueError, match="--set lr=2: lr is given twice"):
        change(Settings(), ["lr=1", "lr=2"])


def test_a_number_or_a_word():
    hint = int | Literal["auto"]
    assert [values.parse("batch_size", text, hint) for text in ("auto", "3")] == ["auto", 3]
    for value in ("auto", 3):
        values.check("batch_size", value, hint)
    for value, message in (("atuo", r"did you mean auto\?"), (0, "at least 1"), (True, "a whole number")):
        with pytest.raises(ValueError, match=message):
            values.check("batch_size", value, hint)
    with pytest.raises(ValueError, match=r"must be a whole number, or auto; did you mean auto\?"):
        values.parse("batch_size", "atuo", hint)


DPO = {"method": "dpo", "pack": False}
EVALUATED = {"eval_file": "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": ""}, "^train_file: not given"),
        *(
            ({"train": "all", name: value}, f"^{name}=.*: has no effect with train=all, only with train=lora")
            for name, value in {
                "lora_rank": 8, "lora_alpha": 8.0, "lora_targets": ("o_proj",), "lora_rslora": True,
                "lora_dropout": 0.1, "dora": True, "rank_pattern": ("o_proj:3",),
            }.items()
        ),
        *(
            ({**DPO, name: value}, f"^{name}={value}: has no effect with method=dpo, only with method=sft")
            for name, value in {"loss_on": "all", "z_loss": 0.1, "label_smoothing": 0.1}.items()
        ),
        ({"dpo_beta": 0.2}, "^dpo_beta=0.2: has no effect with method=sft, only with method=dpo"),
        ({"optimizer": "adafactor", "beta1": 0.8}, "^beta1=0.8: has no effect with optimizer=adafactor"),
        ({"optimizer": "sgd", "beta2": 0.8}, "^beta2=0.8: has no effect with optimizer=sgd"),
        ({"optimizer": "lion", "epsilon": 1e-6}, "^epsilon=1e-06: .* only with optimizer=adamw or adamw8bit; leave"),
        ({"schedule": "constant", "final_lr": 0.0}, "^final_lr=0.0: has no effect with schedule=constant"),
        *(
            ({name: value}, f"^{name}={value}: nothing is evaluated; name an eval_file, or give eval_fraction")
            for name, value in {"patience": 2, "keep_best": 3}.items()
        ),
        ({"sample_prompts": "x", "samples": 0}, "^sample_prompts=x: with samples=0 none is answered"),
        ({"warmup_steps": 31, "steps": 30}, "^warmup_steps=31: beyond the end of the run, steps=30"),
        ({"lr": 2.0}, "^lr=2.0: optimizer=adamw moves each weight by about so much"),
        ({"lr": 0.5, "weight_decay": 2.0}, "^weight_decay=2.0: with lr=0.5 a step takes all of a weight away"),
    ],
)  # fmt: skip
def test_settings_together(changes, message):
    with pytest.raises(ValueError, match=message):
        check_together(Settings(**{"train_file": "a", **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep_best": 0, "samples": 0},  # nothing is asked for
        {"steps": 3},  # defaults are not given
        {"train": "all", "neftune_alpha": 5.0},
        {**DPO, "dpo_beta": 0.3, "neftune_alpha": 5.0, "lora_dropout": 0.1},
        {"optimizer": "sgd", "lr": 3.0, "beta1": 0.8},
        {"optimizer": "adafactor", "schedule": "constant"},
        {"eval_fraction": 0.1, "keep_best": 3, "patience": 2},
        {"epochs": 2.0, "warmup_steps": 200},
        {"sample_prompts": "x", "samples": 5},
        {"samples": 5},  # of the training data
    ],
)
def test_settings_that_agree(changes):
    check_together(Settings(**{"train_file": "a", **changes}))


def test_devices_share_a_batch(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda: SimpleNamespace(size=2))
    with pytest.raises(ValueError, match="batch_size=7: must be a multiple of the number of devices, 2"):
        check_together(Settings(train_file="a", batch_size=7))


def test_each_field_has_a_value_of_its_own_type():
    for field in dataclasses.fields(Settings):
        with pytest.raises(ValueError, match=f"^{field.name}="):
            Settings(**{field.name: object()})
    assert set(values._RANGES) < {field.name for field in dataclasses.fields(Settings)}


# ------------------------------------------------------------------------------------------- the checkpoint and files


def test_rows_are_not_longer_than_the_context(tiny):
    """With LongRoPE that is the long one, here 64; up to 16 tokens have the short factors."""
    for length in (16, 17, 64):
        check_sizes(Settings(sequence_length=length), tiny.config)
    with pytest.raises(
        ValueError, match=r"sequence_length=65: demo has a context of 64 tokens \(max_position_emb.*=64"
    ):
        check_sizes(Settings(sequence_length=65), tiny.config)
    short = dataclasses.replace(tiny.config, long_rope=None, max_position_embeddings=16)
    with pytest.raises(ValueError, match="sequence_length=17: demo has a context of 16 tokens"):
        check_sizes(Settings(sequence_length=17), short)


def test_a_head_is_tied_only_where_it_is_one(tiny):
    tied = Settings(sequence_length=8, lora_tied=True, lora_targets=("o_proj", "embed_tokens"))
    for is_tied in (True, False):
        config = dataclasses.replace(tiny.config, tie_word_embeddings=is_tied)
        with (
            pytest.raises(ValueError, match="lora_tied=true: the head of demo is not tied")
            if not is_tied
            else nullcontext()
        ):
            check_sizes(tied, config)


def test_a_rank_is_not_beyond_the_matrices(tiny):
    check_sizes(Settings(sequence_length=8, lora_rank=24), tiny.config)
    for name, shape in (("qkv_proj", "80 x 24"), ("down_proj", "24 x 40")):
        with pytest.raises(ValueError, match=f"lora_rank=25: {name} of demo is a matrix of {shape}, its rank is 24 at"):
            check_sizes(Settings(sequence_length=8, lora_rank=25, lora_targets=(name,)), tiny.config)


def test_the_config_is_read_without_the_weights(tiny, tiny_folder, tmp_path):
    (tiny_folder / "model.safetensors").unlink()
    assert read_config(tiny_folder) == tiny.config
    config = dataclasses.replace(tiny.config, num_attention_heads=3, num_key_value_heads=1, long_rope=None)
    zeros = {path: np.zeros(shape, np.float32) for path, shape in parameter_shapes(config).items()}
    params = flax.traverse_util.unflatten_dict(zeros, sep="/")
    save_gguf(dataclasses.replace(tiny, config=config, params=params), tmp_path / "x.gguf", "f32")
    # GGUF has no place for how weights began.
    assert dataclasses.replace(read_config(tmp_path / "x.gguf"), initializer_range=0.3) == config


def test_of_a_hub_id_only_the_config_is_fetched(tiny_folder, tiny, monkeypatch, tmp_path):
    with serve("models/some/model", tiny_folder, tmp_path / "home", monkeypatch) as hub:
        assert read_config("some/model") == read_config("some/model@v2") == tiny.config
        assert {Path(path).name for path in hub.asked if "/resolve/" in path} == {"config.json"}


def test_a_run_refuses_before_it_loads(tmp_path, monkeypatch):
    settings = write_run(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "integers").mkdir()
    (tmp_path / "integers" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "phi3_jax"}})
    )

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(phi3_jax, "load", refuse)
    for name, text in {
        "word.jsonl": "not json\n", "empty.jsonl": "\n", "form.jsonl": json.dumps({"a": 1}),
        "pairs.jsonl": json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    folder = str(tmp_path)
    whole = {"train": "all", "lora_rank": 16, "lora_dropout": 0.0}
    for changes, message in (
        ({"sequence_length": 65}, "sequence_length=65: .*model has a context of 64 tokens"),
        ({"lora_rank": 25}, "lora_rank=25: "),
        ({"checkpoint": f"{folder}/none"}, "no such folder or file"),
        ({"checkpoint": f"{folder}/integers", **whole}, "train=all: integers cannot be trained, and .* holds integers"),
        ({"checkpoint": f"{folder}/integers", "dora": True}, "dora=true: needs floats, and .* holds integers"),
        ({"train_file": f"{folder}/none.jsonl"}, "none.jsonl: no such file"),
        ({"eval_file": f"{folder}/none.jsonl"}, "none.jsonl: no such file"),
        ({"train_file": f"{folder}/word.jsonl"}, "word.jsonl, line 1: it is not JSON"),
        ({"eval_file": f"{folder}/empty.jsonl"}, "empty.jsonl: no line of it can be used: it is empty"),
        ({"train_file": f"{folder}/form.jsonl"}, "form.jsonl, line 1: "),
        ({"train_file": f"{folder}/pairs.jsonl"}, "pairs.jsonl, line 1: "),
        ({"sample_prompts": f"{folder}/none.txt", "samples": 2}, "sample_prompts=.*none.txt: no such file"),
        ({"z_loss": 0.1, **DPO}, "z_loss=0.1: has no effect with method=dpo"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(dataclasses.replace(settings, output=f"{folder}/new", **changes))
    assert not (tmp_path / "new").exists()
    skipping = {"output": f"{folder}/new", "on_bad_line": "skip"}
    with pytest.raises(ValueError, match=r"word.jsonl, line 1: it is not JSON .*; and no other line of it can be used"):
        train(dataclasses.replace(settings, train_file=f"{folder}/word.jsonl", **skipping))
    with (tmp_path / "word.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a"}))
    with pytest.raises(AssertionError, match="loaded"):
        train(dataclasses.replace(settings, train_file=f"{folder}/word.jsonl", **skipping))

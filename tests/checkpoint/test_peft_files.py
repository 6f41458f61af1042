"""Adapters in PEFT's files: read, written, refused; and added to checkpoints while those are loaded."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from adapters import BASE, RECORDED, random_adapter

import phi3_jax
from phi3_jax.adapters import TARGETS, LoraConfig, attach, merge
from phi3_jax.checkpoint import load_adapter, save_adapter
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.infer import generate
from phi3_jax.quantization import quantize_params

KINDS = ["lora", "rslora", "dora"]
CONFIG = phi3_jax.Phi3Config.from_hf(json.loads((BASE / "config.json").read_text()), "config.json")


def stored(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def changed(tmp_path):
    """A copy of a recorded adapter with some settings, and perhaps tensors, that differ."""

    def change(kind: str = "lora", change_tensors: Any = None, **settings: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(RECORDED / kind, folder)
        (folder / "adapter_config.json").write_text(json.dumps(settings_of(folder) | settings))
        if change_tensors:
            tensors = stored(folder)
            change_tensors(tensors)
            safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return change


# ------------------------------------------------------------------------------------------------- read and written


def test_what_peft_wrote_is_read():
    lora, adapter = load_adapter(RECORDED / "lora", CONFIG)
    assert lora == LoraConfig(3, 7, TARGETS)
    tensors = stored(RECORDED / "lora")
    for i, layer in enumerate(adapter["layers"]["mlp"]["down_proj"]["a"]):
        np.testing.assert_array_equal(layer, tensors[f"base_model.model.model.layers.{i}.mlp.down_proj.lora_A.weight"])
    assert load_adapter(RECORDED / "rslora", CONFIG)[0] == LoraConfig(4, 3, ("qkv_proj", "down_proj"), rslora=True)
    lora, adapter = load_adapter(RECORDED / "dora", CONFIG)
    assert lora == LoraConfig(2, 5, TARGETS, dora=True)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(
        adapter["layers"]["self_attn"]["o_proj"]["magnitude"][1], stored(RECORDED / "dora")[name]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_peft_writes(kind, tmp_path):
    """The same tensors bit for bit, and of the settings those that mean something."""
    lora, adapter = load_adapter(RECORDED / kind, CONFIG)
    save_adapter(tmp_path / "ours", adapter, lora, CONFIG, "tests/goldens/gqa")
    ours, theirs = stored(tmp_path / "ours"), stored(RECORDED / kind)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == np.float32 for name in theirs)
    settings, peft = settings_of(tmp_path / "ours"), settings_of(RECORDED / kind)
    assert settings | {"target_modules": sorted(settings["target_modules"])} == {
        key: sorted(peft[key]) if key == "target_modules" else peft[key] for key in settings
    }
    again_lora, again = load_adapter(tmp_path / "ours", CONFIG)
    assert again_lora == lora
    assert_equal(again, adapter)


def test_a_dropout_and_half_an_alpha_survive(tmp_path):
    lora = LoraConfig(2, 0.5, ("gate_up_proj",), dropout=0.125)
    adapter = random_adapter(CONFIG, lora)
    save_adapter(tmp_path / "x", adapter, lora, CONFIG, "")
    read, again = load_adapter(tmp_path / "x", CONFIG)
    assert read == lora
    assert_equal(again, adapter)


def test_writing_leaves_nothing_behind_where_it_fails(tmp_path, monkeypatch):
    lora, adapter = load_adapter(RECORDED / "lora", CONFIG)
    with pytest.raises(FileExistsError, match="exists already"):
        save_adapter(tmp_path, adapter, lora, CONFIG, "")
    with pytest.raises(ValueError, match="leaves are not those of the model and the LoraConfig"):
        save_adapter(tmp_path / "x", adapter, LoraConfig(4, 7), CONFIG, "")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi3_jax.checkpoint.safetensors_files.write_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "x", adapter, lora, CONFIG, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_modules": "all-linear"}, {0, 1}),
        ({"target_modules": ["q_proj", *TARGETS, "lm_head.x"]}, {0, 1}),
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0]}, {0}),
        ({"target_modules": [f"layers.1.{n}" for n in ("self_attn.qkv_proj", "mlp.down_proj")]}, {1}),
    ],
)
def test_which_matrices_are_meant(changed, settings, layers):
    """Layers that are left out have an adapter of zeros, which changes nothing."""
    kind = "rslora" if "layers.1" in settings.get("target_modules", [""])[0] else "lora"

    def only_layers(tensors):
        for name in [name for name in tensors if int(name.split(".")[4]) not in layers]:
            del tensors[name]

    lora, adapter = load_adapter(changed(kind, only_layers, **settings), CONFIG)
    whole_lora, whole = load_adapter(RECORDED / kind, CONFIG)
    assert lora == whole_lora
    left_out = np.asarray([i not in layers for i in range(2)])
    assert_equal(adapter, jax.tree.map(lambda leaf: leaf * ~left_out.reshape(2, 1, 1), whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is computed here; merge the adapter"),
        ({"bias": "some"}, "bias='some' is none of 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights, too; merge"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base's weights, too; merge"),
        ({"rank_pattern": {"o_proj": 2}}, r"wrong shapes: .*o_proj.lora_A.weight is \[3, 36\] instead of \[2, 36\]"),
        ({"rank_pattern": {"o_proj": "2"}}, "layers.0.self_attn.o_proj: the rank of an adapter must be a whole number"),
        ({"alpha_pattern": {"o_proj": None}}, "layers.0.self_attn.o_proj: an adapter's alpha must be a number"),
        ({"alpha_pattern": ["o_proj"]}, r"alpha_pattern=\['o_proj'\] must map names to numbers"),
        ({"rank_pattern": {"(o_proj": 3}}, r"is no regular expression \(missing \), unterminated subpattern"),
        ({"rank_pattern": {"o_proj)": 3}}, r"is no regular expression \(unbalanced parenthesis"),
        ({"target_modules": r"(.)\1.*"}, "GROUPREF in a regular expression is not computed here: write the names out"),
        ({"target_modules": r"(?i).*O_PROJ"}, "ignores the case, which is not computed here"),
        ({"target_modules": ".*" * 5001}, "a pattern of 10002 characters is longer than 10000"),
        ({"modules_to_save": ["lm_head"]}, "missing tensors: base_model.model.lm_head.weight"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' must be a list of names"),
        ({"exclude_modules": 3}, "exclude_modules=3 must be a list of names"),
        ({"exclude_modules": ["o_proj"]}, "unknown tensors: base_model.model.model.layers.0.self_attn.o_proj.lora_A"),
        ({"exclude_modules": TARGETS}, "names none of"),
        ({"lora_bias": True}, "lora_bias=True is not computed here"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not computed here"),
        ({"trainable_token_indices": [3]}, "missing tensors: .*embed_tokens.token_adapter.trainable_tokens_delta"),
        ({"trainable_token_indices": {"x": [3]}}, "trainable_token_indices=.* is not computed here"),
        ({"trainable_token_indices": [True]}, "trainable_token_indices=.* must be a list of token ids"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens=.* is not computed here"),
        ({"target_parameters": ["mlp.x"]}, "target_parameters=.* is not computed here"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not computed here"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config=.* is not computed here"),
        ({"megatron_config": {"x": 1}}, "megatron_config=.* is not computed here"),
        ({"use_qalora": True}, "use_qalora=True is not computed here"),
        ({"of_next_year": 1}, "of_next_year=1 is not computed here"),
        ({"target_modules": r".*\.o_proj"}, "unknown tensors: .*layers.0.mlp.down_proj.lora_A.weight"),
        ({"target_modules": "o_proj"}, "target_modules='o_proj' names none of"),
        ({"target_modules": None}, "target_modules=None must be a list of names, a regular expression or 'all-linear'"),
        (
            {"target_modules": "all-linear", "layers_to_transform": 1},
            "layers_to_transform=1 needs a list of target_modules",
        ),
        ({"layers_to_transform": [0], "layers_pattern": "a|b"}, r"layers_pattern='a\|b' is not computed here"),
        ({"target_modules": ["q_proj", "v_proj"]}, "names none of .*qkv_proj in any layer that it is for"),
        ({"layers_to_transform": [7]}, "names none of"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1' must be a layer's number"),
        ({"r": "3"}, "the rank of an adapter must be a whole number from 1 on, not '3'"),
        ({"lora_alpha": None}, "an adapter's alpha must be a number"),
        ({"r": 10**9}, r"wrong shapes: .*lora_A.weight is \[3, 36\] instead of \[1000000000, 36\]"),
        (
            {"target_modules": ["o_proj"]},
            "unknown tensors: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        ),
        ({"use_dora": True}, "missing tensors: .*layers.0.mlp.down_proj.lora_magnitude_vector"),
    ],
)
def test_what_is_not_computed_here_is_refused(changed, settings, message):
    folder = changed(**settings)
    with pytest.raises(ValueError, match=message) as refused:
        load_adapter(folder, CONFIG)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all", "fan_in_fan_out": True, "init_lora_weights": "gaussian", "ensure_weight_tying": True},
        {"bias": "lora_only", "init_lora_weights": "mica", "velora_config": {"num_groups": 64, "scale": 1.0}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "inference_mode": False, "task_type": "SEQ_CLS"},
        {"loftq_config": {}, "lora_ga_config": None, "auto_mapping": {"base_model_class": "x", "unsloth_fixed": True}},
    ],
)
def test_options_that_change_no_number(changed, settings):
    """On top of all the keys that PEFT 0.21 writes."""

    def add(tensors):
        tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_velora_embed"] = np.ones(4, np.float32)

    read = load_adapter(changed("lora", add if "velora_config" in settings else None, **settings), CONFIG)
    assert_equal(read, load_adapter(RECORDED / "lora", CONFIG))


def test_a_second_file_of_weights_is_not_read(changed):
    folder = changed()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    told = "adapter_model.safetensors is read, as by PEFT, and adapter_model.bin is not"
    with pytest.warns(UserWarning, match=told):
        load_adapter(folder, CONFIG)
    with pytest.warns(UserWarning, match=told):
        phi3_jax.load(BASE, adapter=folder)


def test_a_folder_of_several_adapters_names_one(changed):
    folder = changed()
    with pytest.raises(
        FileNotFoundError, match=f"adapter_config.json: the file is missing; .*; there is one in {folder}"
    ):
        load_adapter(folder.parent, CONFIG)


def test_tensors_that_do_not_fit_are_named(changed):
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"

    def damage(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(name)

    with pytest.raises(ValueError, match=rf"missing tensors: {name}; unknown tensors: base_model.model.lm_head.lora_A"):
        load_adapter(changed(change_tensors=damage), CONFIG)


def test_files_that_are_missing_or_damaged(changed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: the file is missing; name a folder that PEFT"):
        load_adapter(tmp_path, CONFIG)
    folder = changed()
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_adapter(folder, CONFIG)
    tensors.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is not read: save it as safetensors"):
        load_adapter(folder, CONFIG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_adapter(folder, CONFIG)


# ---------------------------------------------------------------------------------------------- added while loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loaded_with_an_adapter(kind):
    base = phi3_jax.load(BASE)
    lora, adapter = load_adapter(RECORDED / kind, base.config)
    expected = merge(base.params, adapter, lora)
    loaded = phi3_jax.load(BASE, adapter=RECORDED / kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded.params, expected)
    in_bfloat16 = phi3_jax.load(BASE, "bfloat16", layout="rows", adapter=RECORDED / kind)
    assert_equal(in_bfloat16.params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), loaded.params))


def test_an_adapter_is_merged_before_weights_are_rounded_if_that_is_asked_for():
    loaded = phi3_jax.load(BASE, adapter=RECORDED / "lora")
    rounded = phi3_jax.load(BASE, quantize="int8", layout="rows", adapter=RECORDED / "lora", merge_adapter=True)
    assert_equal(rounded.params, quantize_params(loaded.params, "int8"))


def test_an_adapter_is_added_to_a_gguf_file(tmp_path):
    save_gguf(phi3_jax.load(BASE), tmp_path / "base.gguf", "f32")
    loaded = phi3_jax.load(tmp_path / "base.gguf", adapter=RECORDED / "lora")
    assert_equal(loaded.params, phi3_jax.load(BASE, adapter=RECORDED / "lora").params)


@pytest.mark.slow
# ------------------------------------------------------------------------------------------------------- the programs


def test_weights_with_an_adapter_attached_generate_but_are_not_saved(tmp_path):
    checkpoint = phi3_jax.load(BASE)
    lora, adapter = load_adapter(RECORDED / "lora", CONFIG)
    attached = dataclasses.replace(checkpoint, params=attach(checkpoint.params, adapter, lora))
    added = dataclasses.replace(checkpoint, params=merge(checkpoint.params, adapter, lora))
    ours, theirs, without = (generate(each, [[3, 4, 5]], 6)[0].token_ids for each in (attached, added, checkpoint))
    assert ours == theirs != without
    with pytest.raises(ValueError, match="an adapter is attached to the weights: `merge` it into floats"):
        phi3_jax.save(attached, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["export", "quantize"])
def test_programs_write_checkpoints_with_the_adapter_added(program, tmp_path):
    """As a program of its own: the flags of phi3-export have the names of others."""
    options = {"export": ["--format", "safetensors", "--type", "f32"], "quantize": ["--quantize", "int8"]}[program]
    command = [sys.executable, "-m", f"phi3_jax.infer.programs.{program}_main", "--checkpoint", str(BASE), *options]
    command += ["--adapter", str(RECORDED / "dora"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dtype = "float32" if program == "export" else "bfloat16"
    params = phi3_jax.load(BASE, dtype, layout="rows", adapter=RECORDED / "dora").params
    if program == "export":
        assert_equal(phi3_jax.load(tmp_path / "out").params, params)
        return
    integers = phi3_jax.load(tmp_path / "out", layout="rows").params["layers"]["mlp"]["down_proj"]["weight"]
    floats = np.asarray(params["layers"]["mlp"]["down_proj"]["weight"], np.float32)
    assert np.abs(integers.dequantize() - floats).max() < np.abs(floats).max() / 100


def test_a_base_whose_name_is_not_utf8(tmp_path):
    lora = LoraConfig(3, 6)
    save_adapter(tmp_path / "x", random_adapter(CONFIG, lora), lora, CONFIG, "models/na\udcefve")
    assert settings_of(tmp_path / "x")["base_model_name_or_path"] == "models/na?ve"
    assert load_adapter(tmp_path / "x", CONFIG)[0].rank == 3

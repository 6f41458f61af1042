"""A changed byte of a file that we wrote is told, wherever it is; files without checksums load as they always did."""

import json
import shutil
import zlib

import numpy as np
import pytest
import safetensors.numpy
from adapters import random_adapter

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import checksums, save_adapter
from phi3_jax.checkpoint.safetensors_files import read_file
from phi3_jax.kernels import why_unavailable


def flip(path, position, bit=3):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_checksum_is_zlibs_over_bytes_and_description(monkeypatch):
    array = np.arange(29 * 31, dtype=np.float32).reshape(29, 31)
    expected = zlib.crc32(b"a.b float32 [29, 31]", zlib.crc32(array.tobytes()))
    assert checksums.tensor_crc32("a.b", array) == expected
    assert checksums.tensor_crc32("a.b", array.T.copy().T) == expected  # another order in memory, the same tensor
    assert checksums.tensor_crc32("a.b", array.reshape(31, 29)) != expected
    assert checksums.crc32(np.zeros((0, 3), np.float16)) == zlib.crc32(b"")
    raw = array.tobytes()
    for size, count in ((1000, 4), (2000, 2), (len(raw), 1)):
        monkeypatch.setattr(checksums, "_CHUNK", size)
        parts = [zlib.crc32(raw[i : i + size]).to_bytes(4, "little") for i in range(0, len(raw), size)]
        assert len(parts) == count
        assert checksums.crc32(array) == (zlib.crc32(b"".join(parts)) if count > 1 else zlib.crc32(raw))


def test_flipped_weights_of_exported_folders_are_told(tiny_folder):
    path = tiny_folder / "model.safetensors"
    whole, start = path.read_bytes(), data_start(path)
    for position in (start, len(whole) - 1, (start + len(whole)) // 2):
        flip(path, position)
        with pytest.raises(ValueError, match=r"model\.safetensors: the file is damaged: .* is not what was written"):
            phi3_jax.load(tiny_folder)
        path.write_bytes(whole)
    phi3_jax.load(tiny_folder)


def test_exchanged_names_types_and_offsets_are_told(tiny_folder):
    """Each of these headers is sound, and describes tensors of the right shapes."""
    path = tiny_folder / "model.safetensors"
    whole, start = path.read_bytes(), data_start(path)
    pair = [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 2)]

    def with_header(change):
        header = json.loads(whole[8:start])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])

    def swap(header):
        header[pair[0]], header[pair[1]] = header[pair[1]], header[pair[0]]

    def retype(header):
        for entry in header.values():
            if "shape" in entry and entry["shape"] == [24]:
                entry |= {"dtype": "F16", "shape": [48]}

    for change in (swap, retype):
        with_header(change)
        sources = read_file(path)
        with pytest.raises(ValueError, match="is not what was written"):
            [source.read() for source in sources.values()]
    with_header(lambda header: header.pop("__metadata__"))
    assert [source.read() is not None for source in read_file(path).values()]
    with_header(lambda header: header["__metadata__"].update({"phi3_jax.crc32": "{}"}))
    with pytest.raises(ValueError, match=r"its list of tensors .* remove phi3_jax\.crc32 from its metadata"):
        read_file(path)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_flipped_integers_and_their_scales_are_told(int4_folder, tmp_path, layout):
    if layout == "packed" and (reason := why_unavailable()) is not None:
        pytest.skip(f"no kernels: {reason}")
    phi3_jax.save(phi3_jax.load(int4_folder, layout=layout), tmp_path / "q")
    path = tmp_path / "q" / "phi3_jax.safetensors"
    whole, start = path.read_bytes(), data_start(path)
    header = json.loads(whole[8:start])
    header.pop("__metadata__")
    kinds = {name.rpartition(".")[2]: entry["data_offsets"][0] for name, entry in header.items()}
    assert len(kinds) == 3  # of each kind of array, one
    for offset in kinds.values():
        flip(path, start + offset + 1)
        with pytest.raises(ValueError, match=r"phi3_jax\.safetensors: .* is not what was written"):
            phi3_jax.load(tmp_path / "q", layout=layout)
        path.write_bytes(whole)
    phi3_jax.load(tmp_path / "q", layout=layout)


def test_sizes_that_take_as_much_room_packed_are_told(int4_folder, tmp_path):
    """Of 97 tokens and 40 numbers, panels of 32 have room for some more."""
    if (reason := why_unavailable()) is not None:
        pytest.skip(f"no kernels: {reason}")
    phi3_jax.save(phi3_jax.load(int4_folder, layout="packed"), tmp_path / "q")
    text = (tmp_path / "q" / "config.json").read_text()
    for lie in ({"intermediate_size": 48}, {"vocab_size": 98}):
        (tmp_path / "q" / "config.json").write_text(json.dumps(json.loads(text) | lie))
        with pytest.raises(ValueError, match=r"config\.json: the sizes make .*, and quantization_config says \["):
            phi3_jax.load(tmp_path / "q")
    older = json.loads(text)
    for entry in older["quantization_config"]["leaves"].values():
        del entry["shape"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(older))
    phi3_jax.load(tmp_path / "q")


def test_a_flipped_adapter_is_told(tiny, tiny_folder, tmp_path):
    lora = LoraConfig(rank=3, alpha=6.0)
    save_adapter(tmp_path / "a", random_adapter(tiny.config, lora), lora, tiny.config, "x")
    flip(tmp_path / "a" / "adapter_model.safetensors", -7 + (tmp_path / "a/adapter_model.safetensors").stat().st_size)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .* is not what was written"):
        phi3_jax.load(tiny_folder, adapter=tmp_path / "a")


def test_others_read_our_files(tiny_folder):
    path = tiny_folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    assert all(np.array_equal(stored[name], source.read()) for name, source in read_file(path).items())
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "pt"  # transformers asks for it


def test_a_file_that_changes_while_it_is_loaded_is_noticed(int4_folder, tmp_path, monkeypatch):
    shutil.copytree(int4_folder, tmp_path / "q")
    path, original = tmp_path / "q" / "phi3_jax.safetensors", read_file

    def read_and_replace(file, *kinds):
        found = original(file, *kinds)
        path.write_bytes(path.read_bytes())
        return found

    monkeypatch.setattr("phi3_jax.checkpoint.safetensors_files.read_file", read_and_replace)
    with pytest.raises(ValueError, match=r"phi3_jax\.safetensors: the file changed while it was loaded"):
        phi3_jax.load(tmp_path / "q", layout="rows")

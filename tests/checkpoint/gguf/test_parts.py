"""GGUF files in parts, written by the package's own splitting writer and by hand."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import as_phi3, write

import phi3_jax
from phi3_jax.checkpoint import named_tensors, resolve, stored_dtype


def assert_same(left: phi3_jax.Checkpoint, right: phi3_jax.Checkpoint) -> None:
    assert left.config == right.config
    assert left.generation == right.generation
    for (name, ours), (other, theirs) in zip(named_tensors(left.params), named_tensors(right.params), strict=True):
        assert name == other
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.fixture
def whole(tiny, tmp_path) -> Path:
    return write(tmp_path / "whole.gguf", tiny.config, as_phi3(tiny), "phi3")


@pytest.fixture(params=[1, 7])
def parts(request, whole, tmp_path) -> list[Path]:
    """The same in parts, the first with metadata alone or with 7 tensors."""
    folder = tmp_path / "parts"
    folder.mkdir()
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "x.gguf", "phi3", split_max_tensors=7, small_first_shard=request.param == 1)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(folder.iterdir())
    assert len(found) == 4 if request.param == 7 else 5
    assert found[0].name.endswith(f"x-00001-of-{len(found):05d}.gguf")
    return found


def test_any_part_and_the_folder_load_the_whole(parts, whole):
    expected = phi3_jax.load(whole)
    for named in [*parts, parts[0].parent]:
        assert_same(phi3_jax.load(named), expected)
    assert resolve(parts[0].parent) == parts[0]
    assert stored_dtype(parts[0].parent) == "float32"


def test_blocks_are_read_from_their_own_part(tiny, tmp_path):
    """The embedding in another type, with the offsets of the second file; metadata in the first alone."""
    tensors = as_phi3(tiny)
    table = tensors.pop("token_embd.weight").astype(np.float16)
    keys = {"split.count": 2, "split.no": 0, "split.tensors.count": len(tensors) + 3}
    first, second = (tmp_path / f"y-0000{i}-of-00002.gguf" for i in (1, 2))
    write(first, tiny.config, tensors, "phi3", lambda given: given.update(keys))
    with_tensors(second, {"token_embd.weight": table}, {"split.no": 1, "split.count": 2})
    loaded = phi3_jax.load(second)
    np.testing.assert_array_equal(loaded.params["embed_tokens"]["weight"], table.astype(np.float32))
    np.testing.assert_array_equal(loaded.params["lm_head"]["weight"], tiny.params["lm_head"]["weight"])
    with_tensors(second, {"output.weight": table}, {"split.no": 1, "split.count": 2})
    with pytest.raises(ValueError, match=r"tensors \['output\.weight'\] are in another part, too"):
        phi3_jax.load(first)
    with_tensors(second, {"token_embd.weight": table, "a": table}, {"split.no": 1, "split.count": 2})
    with pytest.raises(ValueError, match=rf"its parts have {len(tensors) + 4} tensors instead of {len(tensors) + 3}"):
        phi3_jax.load(first)


def with_tensors(path: Path, tensors: dict[str, np.ndarray], keys: dict[str, int]) -> None:
    writer = gguf.GGUFWriter(path, "phi3")
    for key, value in keys.items():
        writer.add_uint16(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_missing_parts_are_listed(parts):
    parts[1].unlink()
    parts[-1].unlink()
    for named in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(FileNotFoundError, match=rf"these are missing: {parts[1].name}, {parts[-1].name}; download"):
            phi3_jax.load(named)


def test_parts_that_do_not_belong_together(parts):
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[2].write_bytes(second)
    with pytest.raises(
        ValueError, match=rf"{parts[2].name}: its header does not say that it is part 3 of {len(parts)}"
    ):
        phi3_jax.load(parts[0])
    with pytest.raises(ValueError, match=rf"{parts[2].name}: one of {len(parts)} parts, .* this one \.\.\.-00002-of"):
        phi3_jax.load(parts[2])
    parts[2].write_bytes(third[:-1])
    with pytest.raises(ValueError, match=rf"{parts[2].name}: the GGUF file is damaged"):
        phi3_jax.load(parts[0])
    parts[2].write_bytes(third)
    parts[0].rename(parts[0].with_name("y.gguf"))
    with pytest.raises(ValueError, match=r"y\.gguf: one of . parts, by its header; give all of them their names again"):
        phi3_jax.load(parts[0].with_name("y.gguf"))


def test_a_name_without_the_header_of_parts(whole, tmp_path):
    """Whole, it is loaded with a word; cut by another program, it is not."""
    expected = phi3_jax.load(whole)
    named = shutil.copy(whole, tmp_path / "z-00001-of-00002.gguf")
    with pytest.warns(UserWarning, match="part 1 of 2, by its name, but it holds a whole model"):
        assert_same(phi3_jax.load(named), expected)
    with_tensors(tmp_path / "z-00002-of-00002.gguf", {"output_norm.weight": np.ones(24, np.float32)}, {})
    with pytest.raises(ValueError, match="part 2 of 2, by its name, but its header does not say so: another program"):
        phi3_jax.load(tmp_path / "z-00002-of-00002.gguf")


def test_a_folder_of_several_models_lists_them(whole, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):  # which of the two is meant?
        phi3_jax.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shutil.copy(whole, tmp_path / "other.gguf")
    with pytest.raises(
        ValueError, match=r"there are 2 GGUF models \(other\.gguf, whole\.gguf\); name one of the files"
    ):
        phi3_jax.load(tmp_path)

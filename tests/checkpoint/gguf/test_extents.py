"""Tables of tensors that lie about where these are, and bytes that have changed since we wrote them."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest
from gguf_files import TYPES, as_phi3, write

import phi3_jax
from phi3_jax.checkpoint.gguf.header import read_header
from phi3_jax.checkpoint.gguf.reader import read_gguf
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.model import random_params


def field(data: bytes, name: str, what: str) -> int:
    """Where a row of the table has its first dimension, its type or its offset."""
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    return at + 4 + {"dimension": 0, "kind": 8 * dimensions, "offset": 8 * dimensions + 4}[what]


def with_value(data: bytes, position: int, value: int, form: str = "<Q") -> bytes:
    copy = bytearray(data)
    struct.pack_into(form, copy, position, value)
    return bytes(copy)


def test_each_flipped_bit_of_each_offset_is_refused(tiny, tmp_path):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3")
    data, names = path.read_bytes(), list(read_header(path)[1])
    for name in (names[0], names[3], names[-1]):
        position = field(data, name, "offset")
        for bit in range(64):
            path.write_bytes(with_value(data, position, struct.unpack_from("<Q", data, position)[0] ^ 1 << bit))
            with pytest.raises(ValueError, match=r"x\.gguf: the GGUF file is damaged"):
                read_gguf(path)


def test_overlaps_gaps_and_trailing_bytes_are_refused(tiny, tmp_path):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3")
    data, table = path.read_bytes(), read_header(path)[1]
    one, other = "blk.0.attn_norm.weight", "blk.2.attn_norm.weight"
    offsets = {name: table[name].offset - table[name].start for name in (one, other)}
    last = next(name for name in table if table[name].offset == max(tensor.offset for tensor in table.values()))
    swapped = with_value(data, field(data, one, "offset"), offsets[other])
    for content, message in {
        with_value(data, field(data, other, "offset"), offsets[one]): "begins at byte .* and the tensor before it ends",
        with_value(swapped, field(data, other, "offset"), offsets[one]): "begins at byte",
        with_value(data, field(data, one, "dimension"), 16): "begins at byte",
        with_value(data, field(data, one, "kind"), TYPES.F16, "<I"): "begins at byte",
        with_value(data, field(data, last, "dimension"), 4096): "ends beyond byte",
        data + bytes(32): "its tensors end at byte",
        data[:-32]: "ends beyond byte|its tensors end at byte",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_gguf(path)
    end = table[last].offset + 4 * int(np.prod(table[last].shape))
    path.write_bytes(data[:end])  # some writers leave the padding behind the last tensor out
    read_gguf(path)


def test_the_largest_dimensions_are_refused_at_once(tiny, tmp_path):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3")
    data, position = path.read_bytes(), field(path.read_bytes(), "blk.0.attn_qkv.weight", "dimension")
    for value in (0, 2**31, 2**62, 2**63, 2**64 - 1):
        path.write_bytes(with_value(data, position, value))
        with pytest.raises(ValueError, match=r"x\.gguf: the GGUF file is damaged"):
            read_gguf(path)


def test_head_sizes_that_lie_are_refused_before_anything_is_built(tiny, tmp_path):
    for change in ({"attention.key_length": 10**9, "attention.value_length": 10**9}, {"attention.head_count": 10**9}):
        config = dataclasses.replace(tiny.config, long_rope=None)
        path = write(tmp_path / "x.gguf", config, as_phi3(tiny), "phi3", lambda keys, c=change: keys.update(c))
        with pytest.raises(ValueError, match=r"x\.gguf: "):
            phi3_jax.load(path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny):
    config = dataclasses.replace(tiny.config, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    model = dataclasses.replace(tiny, config=config, params=random_params(config, "float32", 1))
    path = tmp_path_factory.mktemp("ours") / "x.gguf"
    save_gguf(model, path, "q8_0")
    return path


def test_any_changed_byte_of_a_file_that_we_wrote_is_told(ours, tmp_path):
    data, path = ours.read_bytes(), tmp_path / "x.gguf"
    start = read_header(ours)[1]["token_embd.weight"].start
    theta = data.index(b"phi3.rope.freq_base") + len(b"phi3.rope.freq_base") + 4
    kind = field(data, "blk.1.ffn_down.weight", "kind")
    for position in (theta, kind, *range(start, len(data), len(data) // 23), len(data) - 1):
        path.write_bytes(with_value(data, position, data[position] ^ 4, "<B"))
        with pytest.raises(
            ValueError, match=r"x\.gguf: .*(is not what was written|its tensors end at byte|not made of whole)"
        ):
            phi3_jax.load(path, layout="rows")


def test_others_read_what_we_wrote_and_files_without_checksums_are_read(ours, tmp_path):
    reader = gguf.GGUFReader(ours)
    table = read_header(ours)[1]
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {n: t.offset for n, t in table.items()}
    trailer = 16 + 4 * (1 + len(table))
    path = tmp_path / "x.gguf"
    path.write_bytes(ours.read_bytes()[:-trailer])
    found, expected = (read_gguf(each).tensors for each in (path, ours))
    assert all(np.array_equal(source.read(), expected[name].read()) for name, source in found.items())
    path.write_bytes(ours.read_bytes()[:-4])
    with pytest.raises(ValueError, match="its tensors end at byte"):
        read_gguf(path)


def test_arrays_and_names_that_fill_the_memory_are_refused_before_they_are_read(tmp_path):
    path, text = tmp_path / "x.gguf", b"general.x"
    for kind, count in ((0, 1 << 24), (8, 1 << 60), (12, 1 << 22), (9, 4)):
        key = struct.pack("<Q9sIIQ", len(text), text, 9, kind, count)
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + bytes(1000))
        with pytest.raises(ValueError, match=r"x\.gguf: .*(items of an array announced|unknown array type 9)"):
            read_header(path)
    for name in (b"a\nb", b"x" * 5000):
        path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(name)) + name + bytes(64))
        with pytest.raises(ValueError, match=r"x\.gguf: .* the name before byte") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

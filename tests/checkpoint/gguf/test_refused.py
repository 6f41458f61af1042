"""GGUF files that cannot be loaded, and files that lie."""

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_files import as_llama, as_phi3, split, variant, vocabulary, write

import phi3_jax
from phi3_jax.checkpoint.gguf.header import read_header
from phi3_jax.checkpoint.gguf.reader import read_gguf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.pop("context_length"), "phi3.context_length is missing"),
        (lambda keys: keys.pop("block_count"), "phi3.block_count is missing"),
        (lambda keys: keys.update({"expert_count": 8}), r"unsupported keys \['phi3.expert_count'\]"),
        (lambda keys: keys.update({"rope.scaling.type": "yarn"}), "phi3.rope.scaling.type is 'yarn'"),
        (
            lambda keys: keys.update({"rope.scaling.factor": 4.0}),
            "LongRoPE's factors and others, or rope.scaling.factor",
        ),
        (lambda keys: keys.update({"rope.scale_linear": 0.5}), "LongRoPE's factors and others, or rope.scaling.factor"),
        (lambda keys: keys.update({"attention.head_count_kv": [2, 2]}), "layers that differ"),
        (lambda keys: keys.update({"feed_forward_length": [40, 40, 44]}), "layers that differ"),
        (lambda keys: keys.update({"attention.value_length": 4}), "keys of 8 and values of 4"),
        (lambda keys: keys.update({"attention.head_count": [6, 6, 3]}), "layers that differ"),
        (lambda keys: keys.update({"attention.head_count_kv": 4}), "not a multiple"),
        (lambda keys: keys.update({"block_count": 4}), r"missing tensors: model\.layers\.3"),
        (lambda keys: keys.update({"block_count": 10**9}), "cannot be those of 1000000000 layers"),
        (lambda keys: keys.update({"block_count": 2}), r"tensors that a Phi-3 decoder does not have: \['blk\.2"),
        (lambda keys: keys.update({"split.count": 3}), r"one of 3 parts, .* this one \.\.\.-00001-of-00003\.gguf"),
        (lambda keys: keys.update({"rope.dimension_count": 6}), "must list rotary_dim/2 = 3 numbers, not 4"),
        (lambda keys: keys.update({"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model is 'bert'"),
        (lambda keys: keys.update({"vocab_size": 96}), "'vocab_size': 96} but an embedding of 97 rows"),
        (lambda keys: keys.update(vocabulary(96)), "'tokens': 96} but an embedding of 97 rows"),
        (lambda keys: keys.update({"attention.causal": False}), r"unsupported keys \['phi3.attention.causal'\]"),
        (
            lambda keys: keys.update({"expert_count": 8, "clamp": 1.0}) or keys.pop("context_length"),
            r"\['phi3.clamp', 'phi3.expert_count'\].*phi3.context_length is missing",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tiny, tmp_path, change, message):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change)
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
        phi3_jax.load(path)


def test_ids_that_the_vocabulary_does_not_have_are_none(tiny, tmp_path):
    for key, value in (("padding", 97), ("eot", 2**32 - 1), ("bos", 98)):
        path = write(
            tmp_path / f"{key}.gguf", tiny.config, as_phi3(tiny), "phi3",
            lambda keys, key=key, value=value: keys.update({f"tokenizer.ggml.{key}_token_id": value}),
        )  # fmt: skip
        with pytest.warns(
            UserWarning, match=rf"{key}_token_id is {value}, and there are 97 tokens: it is left out|left"
        ):
            loaded = phi3_jax.load(path)
        assert loaded.config.pad_token_id is None or key != "padding"
        assert value not in loaded.generation.eos_token_ids


def test_unknown_tensors_types_and_architectures(tiny, tmp_path):
    tensors = as_phi3(tiny)
    path = write(tmp_path / "a.gguf", tiny.config, tensors | {"blk.0.attn_q.bias": np.ones(3, np.float32)}, "phi3")
    with pytest.raises(ValueError, match=r"does not have: \['blk\.0\.attn_q\.bias'\]"):
        phi3_jax.load(path)
    path = write(tmp_path / "b.gguf", tiny.config, tensors | {"output_norm.weight": np.ones(24, np.float64)}, "phi3")
    with pytest.raises(ValueError, match=r"tensors of unsupported types {'output_norm\.weight': 'F64'}"):
        phi3_jax.load(path)
    short = {"rope_factors_short.weight": np.ones(4, np.float32)}
    config = dataclasses.replace(tiny.config, long_rope=None)
    with pytest.raises(ValueError, match="needs both factor tensors, and only rope_factors_short"):
        phi3_jax.load(write(tmp_path / "d.gguf", config, tensors | short, "phi3"))
    path = write(tmp_path / "c.gguf", tiny.config, tensors, "mamba")
    with pytest.raises(ValueError, match="architecture 'mamba' cannot be loaded"):
        phi3_jax.load(path)


@pytest.mark.parametrize("change", [{"rope.scaling.type": "longrope"}, {"rope.scaling.original_context_length": 16}])
def test_a_longrope_model_that_lost_its_factors(tiny, tmp_path, change):
    """A converter of 2026 drops them without a word for checkpoints in transformers' newer layout."""
    original = variant(tiny, long_rope=None)
    path = write(tmp_path / "x.gguf", original.config, as_phi3(original), "phi3", lambda keys: keys.update(change))
    with pytest.raises(ValueError, match="the tensors of its factors are missing"):
        phi3_jax.load(path)


def test_llama_files_whose_rows_have_no_known_order(tiny, tmp_path):
    original = variant(tiny, long_rope=None, sliding_window=None)
    path = write(tmp_path / "fused.gguf", original.config, as_phi3(original), "llama")
    with pytest.raises(ValueError, match=r"does not have: \['blk\.0\.attn_qkv\.weight'"):
        phi3_jax.load(path)
    original = variant(original, partial_rotary_factor=0.5)
    path = write(tmp_path / "partial.gguf", original.config, as_llama(original), "llama")
    with pytest.raises(ValueError, match=r"llama\.rope\.dimension_count must be the size of a head, 8"):
        phi3_jax.load(path)


def test_parts_that_only_add_up_to_the_right_shape(tiny, tmp_path):
    tensors = split(as_phi3(tiny), tiny.config)
    q, k = tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_k.weight"]
    tensors |= {"blk.0.attn_q.weight": q[:40], "blk.0.attn_k.weight": np.concatenate([q[40:], k])}
    path = write(tmp_path / "x.gguf", tiny.config, tensors, "phi3")
    with pytest.raises(ValueError, match=r"\[40, 24\], \[24, 24\], \[16, 24\]\] do not fit the configuration"):
        phi3_jax.load(path)


@pytest.mark.filterwarnings("ignore:.*_token_id is .* left out")
def test_keys_of_any_type_and_size_give_value_errors_only(tiny, tmp_path):
    """Random bytes seldom get past the lengths in a header, so every key takes every kind of value here."""
    keys = {}
    write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", lambda given: keys.update(given | vocabulary(97)))
    keys |= {"split.count": 1, "vocab_size": 97, "rope.scaling.attn_factor": 1.5, "general.alignment": 32}
    tensors, path, refused = as_phi3(tiny), tmp_path / "x.gguf", []
    values = (0, 1, 2**31 - 1, 1.5, float("nan"), "x", True, [0], ["x"], [1.5])
    for changed in ({}, *({key: value} for key in keys for value in values)):
        write(path, tiny.config, tensors, "phi3", lambda given, changed=changed: given.update(keys | changed))
        try:
            sources = read_gguf(path).tensors
        except ValueError as error:
            refused.append((changed, str(error)))
        else:
            assert all(source.read().shape == source.shape for source in sources.values())
    assert {} not in [changed for changed, _ in refused]
    assert all(message.startswith(f"{path}: ") for _, message in refused)
    assert len(refused) > 8 * len(keys)


@pytest.fixture
def sound(tiny, tmp_path) -> Path:
    return write(tmp_path / "sound.gguf", tiny.config, as_phi3(tiny), "phi3")


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, b"\1\0\0\0", "has version 1"),
        (4, b"\0\0\0\3", "is big-endian"),
        (8, b"\xff" * 8, "entries announced"),
        (16, b"\xff" * 8, "entries announced"),
        (24, b"\xff" * 8, "bytes expected"),
        (24, (1 << 26).to_bytes(8, "little"), "header is longer than"),
    ],
)
def test_headers_that_lie(sound, position, content, message):
    with sound.open("r+b") as file:
        file.truncate(1 << 27)  # takes no room on the disk, and a length of 64 MB could be true
        file.seek(position)
        file.write(content)
    with pytest.raises(ValueError, match=message):
        phi3_jax.load(sound)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", (4,), 0), ("b", (4,), 32)], None),
        ([("a", (4,), 0), ("a", (4,), 32)], r"duplicate tensor names \['a'\]"),
        ([("a", (4,), 0), ("b", (4,), 16)], r"tensors \['b'\] do not start at a multiple of 32"),
        ([("a", (1 << 62, 0), 0)], "cannot lie in"),
        ([("a", (1 << 40, 1 << 40), 0)], "cannot lie in"),
        ([("a", (1, 1, 1, 1, 1), 0)], "has 5 dimensions"),
        ([("a", (4,), 0)] * 70_000, "70000 tensors and 0 keys: too many entries announced"),
    ],
)
def test_tables_of_tensors_that_cannot_be(tmp_path, rows, message):
    def row(name, shape, offset):
        return struct.pack(f"<Q1sI{len(shape)}QIQ", 1, name.encode(), len(shape), *shape, 0, offset)

    path = tmp_path / "x.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, len(rows), 0) + b"".join(row(*r) for r in rows) + bytes(64))
    if message is None:
        assert list(read_header(path)[1]) == [name for name, _, _ in rows]
    else:
        with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
            read_header(path)


def test_truncated_and_scrambled_files_give_value_errors_only(sound, tmp_path):
    """Wherever the file is cut, and whichever byte of its header is wrong."""
    data = sound.read_bytes()
    start = min(tensor.offset for tensor in read_header(sound)[1].values())
    random = np.random.default_rng(1)
    damaged = [data[:cut] for cut in (*range(0, start, 97), len(data) - 1)]
    for _ in range(600):
        copy = bytearray(data)
        for place in random.integers(0, start, random.integers(1, 4)):
            copy[place] = random.integers(0, 256)
        damaged.append(bytes(copy))
    path, refused = tmp_path / "damaged.gguf", 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read_gguf(path)
        except ValueError as error:
            refused += str(error).startswith(str(path))
        else:
            # A changed name of a tensor, say, is found when the tensors are put into the tree.
            assert sum(np.prod(source.shape) for source in found.tensors.values()) < 8 * len(data)
            refused += 1
    assert refused == len(damaged)


def test_a_truncated_real_file(demo, tmp_path):
    whole = phi3_jax.checkpoint.resolve("demo")
    shutil.copyfile(whole, tmp_path / "x.gguf")
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate(whole.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"x\.gguf: the GGUF file is damaged or incomplete: .* ends beyond byte"):
        phi3_jax.load(tmp_path / "x.gguf")

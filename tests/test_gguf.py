import dataclasses
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

import phi3_jax
from phi3_jax.gguf_header import read_header
from phi3_jax.gguf_import import read_gguf
from phi3_jax.weights import named_tensors

TYPES = gguf.GGMLQuantizationType
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, config: phi3_jax.Phi3Config, tensors: dict, architecture: str, change=lambda keys: None) -> Path:
    """Writes tensors ({name: array or (raw bytes, type)}) with the keys of a configuration, which `change` may edit."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window or 0,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.long_rope:
        keys["rope.scaling.original_context_length"] = config.long_rope.original_max_position_embeddings
        tensors = tensors | {
            "rope_factors_short.weight": np.asarray(config.long_rope.short_factor, np.float32),
            "rope_factors_long.weight": np.asarray(config.long_rope.long_factor, np.float32),
        }
    change(keys)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        full = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](full, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (np.ascontiguousarray(tensor), None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_phi3(checkpoint: phi3_jax.Checkpoint) -> dict[str, np.ndarray]:
    """The tensors under the names of a phi3 GGUF file, which keeps them fused."""
    renamed = {}
    for name, tensor in named_tensors(checkpoint.params):
        stem = name.removesuffix(".weight")
        if stem in TOP:
            renamed[f"{TOP[stem]}.weight"] = tensor
        else:
            _, _, i, part = stem.split(".", 3)
            renamed[f"blk.{i}.{LAYER[part]}.weight"] = tensor
    return renamed


def as_llama(checkpoint: phi3_jax.Checkpoint) -> dict[str, np.ndarray]:
    """The same split, with the rows of q and k one head and one row at a time in the order of interleaved pairs."""
    config, tensors = checkpoint.config, as_phi3(checkpoint)
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def interleaved(weight, heads):
        rows = []
        for head in range(heads):
            for i in range(H // 2):
                rows += [weight[head * H + i], weight[head * H + i + H // 2]]
        return np.stack(rows)

    for i in range(config.num_hidden_layers):
        qkv, gate_up = tensors.pop(f"blk.{i}.attn_qkv.weight"), tensors.pop(f"blk.{i}.ffn_up.weight")
        tensors[f"blk.{i}.attn_q.weight"] = interleaved(qkv[: N * H], N)
        tensors[f"blk.{i}.attn_k.weight"] = interleaved(qkv[N * H : (N + K) * H], K)
        tensors[f"blk.{i}.attn_v.weight"] = qkv[(N + K) * H :]
        tensors[f"blk.{i}.ffn_gate.weight"], tensors[f"blk.{i}.ffn_up.weight"] = np.split(gate_up, 2)
    return tensors


def assert_same(loaded: phi3_jax.Checkpoint, expected: phi3_jax.Checkpoint) -> None:
    assert loaded.config == dataclasses.replace(expected.config, pad_token_id=None, initializer_range=0.02)
    left, right = dict(named_tensors(loaded.params)), dict(named_tensors(expected.params))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def variant(tiny: phi3_jax.Checkpoint, **changes) -> phi3_jax.Checkpoint:
    config = dataclasses.replace(tiny.config, **changes)
    return dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"long_rope": None, "sliding_window": None},
        {"tie_word_embeddings": True},
        {"long_rope": phi3_jax.LongRope((1.0, 1.5, 2.0), (2.0, 3.0, 7.0), 16), "partial_rotary_factor": 0.75},
    ],
)
def test_phi3_files_load_exactly(tiny, tmp_path, changes):
    original = variant(tiny, **changes)
    path = write(tmp_path / "x.gguf", original.config, as_phi3(original), "phi3")
    assert_same(phi3_jax.load(path), original)


def test_llama_files_are_fused_and_their_rows_put_back(tiny, tmp_path):
    original = variant(tiny, long_rope=None, sliding_window=None)
    path = write(tmp_path / "x.gguf", original.config, as_llama(original), "llama")
    assert_same(phi3_jax.load(path), original)


def test_longropes_attention_factor_is_taken_over(tiny, tmp_path):
    def change(keys):
        keys["rope.scaling.attn_factor"] = 1.1902380

    loaded = phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change))
    assert loaded.config.long_rope.attention_factor == pytest.approx(1.1902380, abs=1e-7)


# Tensor types, against dequantisers written from the formats' definitions, one value at a time.


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def slow_q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * int(q) for q in np.frombuffer(b[2:34], np.int8)]


def slow_q4_0(b: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in b[2:18]] + [byte >> 4 for byte in b[2:18]]
    return [half(b[:2]) * (q - 8) for q in nibbles]


def slow_q4_1(b: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in b[4:20]] + [byte >> 4 for byte in b[4:20]]
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles]


def six_bit(scales: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j of a K-quant, packed into twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
    return scale, (scales[j + 4] >> 4) | (scales[j] >> 6) << 4


def slow_k(b: bytes, fifth_bit: bool) -> list[float]:
    d, low, scales = half(b[:2]), half(b[2:4]), b[4:16]
    high, quants = (b[16:48], b[48:176]) if fifth_bit else (bytes(32), b[16:144])
    values = []
    for j in range(8):
        scale, minimum = six_bit(scales, j)
        for i in range(32):
            byte = quants[32 * (j // 2) + i]
            q = (byte >> 4 if j % 2 else byte & 15) + 16 * (high[i] >> j & 1)
            values.append(d * scale * q - low * minimum)
    return values


def slow_q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8), half(b[208:210])
    values = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, position = divmod(rest, 32)
        byte = low[64 * part + position + 32 * (quarter % 2)]
        q = (byte >> 4 if quarter >= 2 else byte & 15) | (high[32 * part + position] >> 2 * quarter & 3) << 4
        values.append(d * int(scales[i // 16]) * (q - 32))
    return values


SLOW = {
    "Q8_0": slow_q8_0,
    "Q4_0": slow_q4_0,
    "Q4_1": slow_q4_1,
    "Q4_K": lambda b: slow_k(b, fifth_bit=False),
    "Q5_K": lambda b: slow_k(b, fifth_bit=True),
    "Q6_K": slow_q6_k,
}


@pytest.mark.parametrize("name", SLOW)
def test_quantised_types_equal_their_definition(tiny, tmp_path, name):
    original = variant(tiny, vocab_size=7, hidden_size=256, long_rope=None, pad_token_id=None)
    block, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (7, 256 // block, size), dtype=np.uint8)
    # The half-precision scales: random bytes would be infinite or NaN now and then.
    for start in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0]}.get(name, [0, 2]):
        scales = random.uniform(-0.1, 0.1, raw.shape[:2]).astype(np.float16)
        raw[..., start : start + 2] = scales[..., None].view(np.uint8)
    expected = np.array([[value for cell in row for value in SLOW[name](cell.tobytes())] for row in raw])
    tensors = as_phi3(original) | {"token_embd.weight": (raw.reshape(7, -1), TYPES[name])}
    loaded = phi3_jax.load(write(tmp_path / "x.gguf", original.config, tensors, "phi3"))
    np.testing.assert_allclose(loaded.params["embed_tokens"]["weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_sixteen_bit_types(tiny, tmp_path, name):
    dtype = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}[name]
    weight = np.asarray(tiny.params["embed_tokens"]["weight"]).astype(dtype)
    tensors = as_phi3(tiny) | {"token_embd.weight": (weight.view(np.uint8), TYPES[name])}
    loaded = phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, tensors, "phi3"))
    np.testing.assert_array_equal(loaded.params["embed_tokens"]["weight"], weight.astype(np.float32))


# What cannot be loaded.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.pop("rope.freq_base"), "phi3.rope.freq_base is missing"),
        (lambda keys: keys.pop("block_count"), "phi3.block_count is missing"),
        (lambda keys: keys.update({"expert_count": 8}), r"unsupported keys \['phi3.expert_count'\]"),
        (lambda keys: keys.update({"rope.scaling.type": "linear"}), "phi3.rope.scaling.type"),
        (lambda keys: keys.update({"attention.value_length": 4}), "keys of 8 and values of 4"),
        (lambda keys: keys.update({"attention.head_count": [6, 6, 3]}), "layers that differ"),
        (lambda keys: keys.update({"attention.head_count_kv": 4}), "not a multiple"),
        (lambda keys: keys.update({"block_count": 4}), r"missing tensors: model\.layers\.3"),
        (lambda keys: keys.update({"block_count": 10**9}), "cannot be those of 1000000000 layers"),
        (lambda keys: keys.update({"block_count": 2}), r"tensors that a Phi-3 decoder does not have: \['blk\.2"),
        (lambda keys: keys.update({"split.count": 3}), "one of 3 parts"),
        (lambda keys: keys.pop("rope.scaling.original_context_length"), "LongRoPE needs both factor tensors"),
        (lambda keys: keys.update({"rope.dimension_count": 6}), "must list rotary_dim/2 = 3 numbers, not 4"),
        (lambda keys: keys.update({"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model is 'bert'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tiny, tmp_path, change, message):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change)
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
        phi3_jax.load(path)


def test_unknown_tensors_types_and_architectures(tiny, tmp_path):
    tensors = as_phi3(tiny)
    path = write(tmp_path / "a.gguf", tiny.config, tensors | {"blk.0.attn_q.bias": np.ones(3, np.float32)}, "phi3")
    with pytest.raises(ValueError, match=r"does not have: \['blk\.0\.attn_q\.bias'\]"):
        phi3_jax.load(path)
    path = write(tmp_path / "b.gguf", tiny.config, tensors | {"output_norm.weight": np.ones(24, np.float64)}, "phi3")
    with pytest.raises(ValueError, match="tensors of unsupported types"):
        phi3_jax.load(path)
    path = write(tmp_path / "c.gguf", tiny.config, tensors, "mamba")
    with pytest.raises(ValueError, match="architecture 'mamba' cannot be loaded"):
        phi3_jax.load(path)


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
    ],
)
def test_headers_that_lie(sound, position, content, message):
    data = bytearray(sound.read_bytes())
    data[position : position + len(content)] = content
    sound.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        phi3_jax.load(sound)


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


def test_the_demo_stops_at_the_ends_of_text_and_turn(demo):
    pieces = [demo.tokenizer.piece(token_id) for token_id in demo.generation.eos_token_ids]
    assert pieces == ["<|endoftext|>", "<|im_end|>"]


def test_a_gguf_model_saved_for_hugging_face_is_the_same_with_its_tokenizer(demo, tmp_path):
    phi3_jax.save(demo, tmp_path / "saved")
    loaded = phi3_jax.load(tmp_path / "saved")
    assert loaded.config == dataclasses.replace(demo.config, eos_token_id=loaded.config.eos_token_id)
    assert loaded.generation == demo.generation
    for (name, left), (_, right) in zip(named_tensors(loaded.params), named_tensors(demo.params), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
    texts = ["Hello 2024!", "<|im_start|>user\n  caf\u00e9 \U0001f600<|im_end|>\n", " a\n\n\tb  12345"]
    for text in texts:
        for parse_special in (True, False):
            expected = demo.tokenizer.encode(text, parse_special=parse_special)
            assert loaded.tokenizer.encode(text, parse_special=parse_special) == expected
            assert loaded.tokenizer.decode(expected) == demo.tokenizer.decode(expected)
    assert loaded.tokenizer.chat_template == demo.tokenizer.chat_template
    assert loaded.tokenizer.special_ids == demo.tokenizer.special_ids

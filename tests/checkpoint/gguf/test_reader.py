import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_files import TYPES, as_llama, as_phi3, split, variant, vocabulary, write

import phi3_jax
from phi3_jax.checkpoint import named_tensors
from phi3_jax.checkpoint.gguf.reader import read_gguf


def assert_same(loaded: phi3_jax.Checkpoint, expected: phi3_jax.Checkpoint) -> None:
    assert loaded.config == dataclasses.replace(expected.config, pad_token_id=None, initializer_range=0.02)
    left, right = dict(named_tensors(loaded.params)), dict(named_tensors(expected.params))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


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


def test_phi3_files_may_be_split_but_are_not_permuted(tiny, tmp_path):
    path = write(tmp_path / "x.gguf", tiny.config, split(as_phi3(tiny), tiny.config), "phi3")
    assert_same(phi3_jax.load(path), tiny)


def test_keys_that_change_nothing(tiny, tmp_path):
    def change(keys):
        keys.update({"rope.scaling.type": "longrope", "rope.scaling.finetuned": True})
        keys.update({"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "vocab_size": 97})

    assert_same(phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change)), tiny)


def test_a_file_without_the_suffix_is_known_by_how_it_begins(tiny, tmp_path):
    path = write(tmp_path / "sha256-0123", tiny.config, as_phi3(tiny), "phi3")
    assert_same(phi3_jax.load(path), tiny)


def test_the_rotary_base_may_be_left_out_if_it_is_the_formats_default(tiny, tmp_path):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", lambda keys: keys.pop("rope.freq_base"))
    assert tiny.config.rope_theta == 10000.0
    assert_same(phi3_jax.load(path), tiny)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope.scaling.type": "linear"},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0, "rope.scale_linear": 0.0},
        {"rope.scaling.factor": 0.0, "attention.layer_norm_epsilon": 1e-6, "tensor_data_layout": "reference"},
        {"attention.head_count": [6, 6, 6], "attention.head_count_kv": [2] * 3, "feed_forward_length": [40] * 3},
    ],
)
def test_defaults_written_out_and_lists_of_one_number_change_nothing(tiny, tmp_path, changes):
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", lambda keys: keys.update(changes))
    assert_same(phi3_jax.load(path), tiny)


def test_every_optional_key_of_llama_cpp_may_be_absent(tiny, tmp_path):
    """head_count_kv is head_count, the size of a head embedding_length / head_count, all of it rotated, and so on."""
    config = dataclasses.replace(
        tiny.config, long_rope=None, sliding_window=None, num_attention_heads=3, num_key_value_heads=3
    )
    original = dataclasses.replace(tiny, config=config)
    qkv = {"qkv_proj": {"weight": original.params["layers"]["self_attn"]["qkv_proj"]["weight"][:, :72]}}
    o = {"o_proj": {"weight": original.params["layers"]["self_attn"]["o_proj"]["weight"][:, :, :24]}}
    layers = original.params["layers"] | {"self_attn": qkv | o}
    original = dataclasses.replace(original, params=original.params | {"layers": layers})
    optional = ("head_count_kv", "key_length", "value_length", "sliding_window")

    def change(keys):
        for key in [*(f"attention.{name}" for name in optional), "rope.dimension_count", "rope.freq_base"]:
            del keys[key]

    for architecture, tensors in {"phi3": as_phi3(original), "llama": as_llama(original)}.items():
        loaded = phi3_jax.load(write(tmp_path / f"{architecture}.gguf", original.config, tensors, architecture, change))
        assert_same(loaded, original)


def test_without_the_original_length_longropes_long_factors_are_not_used(tiny, tmp_path):
    """llama.cpp's default of the original length is the context length."""
    path = tmp_path / "x.gguf"
    write(path, tiny.config, as_phi3(tiny), "phi3", lambda keys: keys.pop("rope.scaling.original_context_length"))
    with pytest.warns(UserWarning, match=r"original_context_length is missing: as in llama\.cpp, .* 64"):
        loaded = phi3_jax.load(path)
    rope = dataclasses.replace(tiny.config.long_rope, original_max_position_embeddings=64)
    assert loaded.config.long_rope == rope


@pytest.mark.parametrize(
    ("changes", "freqs", "expected"),
    [
        ({}, [1.0, 1.0, 2.5, 8.0], (1.0, 1.0, 2.5, 8.0)),
        ({"rope.scaling.original_context_length": 16}, [1.0, 1.0, 1.0, 4.0], (1.0, 1.0, 1.0, 4.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, (4.0,) * 4),
        ({"rope.scale_linear": 4.0}, [1.0, 1.0, 2.0, 8.0], (4.0, 4.0, 8.0, 32.0)),
        ({"rope.scaling.factor": 1.0}, [1.0] * 4, None),
    ],
)
def test_divisors_of_the_rotary_frequencies(tiny, tmp_path, changes, freqs, expected):
    """Llama 3's tensor and linear scaling are LongRoPE with one set of factors: llama.cpp's theta / factor."""
    config = dataclasses.replace(tiny.config, long_rope=None, sliding_window=None)
    original = dataclasses.replace(tiny, config=config)
    tensors = as_llama(original) | ({"rope_freqs.weight": np.asarray(freqs, np.float32)} if freqs else {})
    path = write(tmp_path / "x.gguf", original.config, tensors, "llama", lambda keys: keys.update(changes))
    rope = phi3_jax.LongRope(expected, expected, 64, attention_factor=1.0) if expected else None
    assert phi3_jax.load(path).config.long_rope == rope


def test_the_key_of_the_vocabularys_size_counts_only_without_tokens(tiny, tmp_path):
    def change(keys):
        keys.update(vocabulary(97) | {"vocab_size": 96})

    loaded = phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change))
    assert loaded.config.vocab_size == loaded.tokenizer.vocab_size == 97


def test_ids_of_a_sentencepiece_vocabulary_have_llama_cpps_defaults(tiny, tmp_path):
    """0, 1 and 2 are unknown, bos and eos; other kinds of vocabularies have no such order."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(94))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 97,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 94,
    }
    path = write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", lambda given: given.update(keys))
    loaded = phi3_jax.load(path)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, (2,))
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (1, 2)
    assert loaded.generation.eos_token_ids == (2,)
    assert loaded.tokenizer.encode("a")[0] == 1
    explicit = {f"tokenizer.ggml.{name}_token_id": i for name, i in {"bos": 5, "eos": 6, "unknown": 0}.items()}
    path = write(tmp_path / "y.gguf", tiny.config, as_phi3(tiny), "phi3", lambda given: given.update(keys | explicit))
    assert (phi3_jax.load(path).config.bos_token_id, phi3_jax.load(path).config.eos_token_id) == (5, (6,))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.uint64, np.int64])
def test_numbers_of_any_width(tiny, tmp_path, kind):
    def change(keys):
        for key in ("block_count", "context_length", "attention.head_count_kv", "rope.dimension_count"):
            keys[key] = kind(keys[key])
        keys["rope.freq_base"] = np.float64(keys["rope.freq_base"])

    assert_same(phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, as_phi3(tiny), "phi3", change)), tiny)


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


def slow_q5(b: bytes, has_min: bool) -> list[float]:
    at = 4 if has_min else 2
    high, low = int.from_bytes(b[at : at + 4], "little"), b[at + 4 :]
    q = [(low[i % 16] >> 4 * (i // 16) & 15) + 16 * (high >> i & 1) for i in range(32)]
    return [half(b[:2]) * x + half(b[2:4]) for x in q] if has_min else [half(b[:2]) * (x - 16) for x in q]


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
    "Q5_0": lambda b: slow_q5(b, has_min=False),
    "Q5_1": lambda b: slow_q5(b, has_min=True),
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
    for start in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0]}.get(name, [0] if name == "Q5_0" else [0, 2]):
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
    path = write(tmp_path / "x.gguf", tiny.config, tensors, "phi3")
    loaded = phi3_jax.load(path)
    np.testing.assert_array_equal(loaded.params["embed_tokens"]["weight"], weight.astype(np.float32))
    source = read_gguf(path).tensors["model.embed_tokens.weight"]
    assert source.dtype == source.read().dtype == dtype


def test_parts_of_different_types_are_fused_in_float32(tiny, tmp_path):
    tensors = split(as_phi3(tiny), tiny.config)
    gate, up = tensors["blk.1.ffn_gate.weight"].astype(ml_dtypes.bfloat16), tensors["blk.1.ffn_up.weight"]
    tensors["blk.1.ffn_gate.weight"] = (gate.view(np.uint8), TYPES.BF16)
    tensors["blk.1.ffn_up.weight"] = up.astype(np.float16)
    loaded = phi3_jax.load(write(tmp_path / "x.gguf", tiny.config, tensors, "phi3"))
    expected = np.concatenate([gate.astype(np.float32), up.astype(np.float16).astype(np.float32)])
    np.testing.assert_array_equal(loaded.params["layers"]["mlp"]["gate_up_proj"]["weight"][1], expected)


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

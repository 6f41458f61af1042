"""Small GGUF files for the tests: the tensors of a checkpoint under the names of either architecture."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np

import phi3_jax
from phi3_jax.checkpoint import named_tensors

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
        add = {
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
            np.uint8: writer.add_uint8,
            np.int16: writer.add_int16,
            np.uint16: writer.add_uint16,
            np.int32: writer.add_int32,
            np.uint64: writer.add_uint64,
            np.int64: writer.add_int64,
            np.float64: writer.add_float64,
        }
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
    config, H = checkpoint.config, checkpoint.config.head_dim
    tensors = split(as_phi3(checkpoint), config)

    def interleaved(weight, heads):
        rows = []
        for head in range(heads):
            for i in range(H // 2):
                rows += [weight[head * H + i], weight[head * H + i + H // 2]]
        return np.stack(rows)

    for i in range(config.num_hidden_layers):
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            tensors[f"blk.{i}.{part}.weight"] = interleaved(tensors[f"blk.{i}.{part}.weight"], heads)
    return tensors


def split(fused: dict[str, np.ndarray], config: phi3_jax.Phi3Config) -> dict[str, np.ndarray]:
    """phi3's tensors with q, k, v, gate and up apart, in the order of rows that they have."""
    tensors, N, K, H = dict(fused), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for i in range(config.num_hidden_layers):
        qkv, gate_up = tensors.pop(f"blk.{i}.attn_qkv.weight"), tensors.pop(f"blk.{i}.ffn_up.weight")
        tensors[f"blk.{i}.attn_q.weight"] = qkv[: N * H]
        tensors[f"blk.{i}.attn_k.weight"] = qkv[N * H : (N + K) * H]
        tensors[f"blk.{i}.attn_v.weight"] = qkv[(N + K) * H :]
        tensors[f"blk.{i}.ffn_gate.weight"], tensors[f"blk.{i}.ffn_up.weight"] = np.split(gate_up, 2)
    return tensors


def variant(tiny: phi3_jax.Checkpoint, **changes) -> phi3_jax.Checkpoint:
    config = dataclasses.replace(tiny.config, **changes)
    return dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))


def vocabulary(tokens: int) -> dict:
    """A byte-level tokenizer's keys."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "ab", *(chr(i) for i in range(97, 95 + tokens))],
        "tokenizer.ggml.token_type": [3] + [1] * (tokens - 1),
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "eot", "unknown", "padding")},
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }

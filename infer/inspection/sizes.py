"""What a model's sizes say without its weights: how many parameters are where, and what a token takes.

Axis letters: L layer, N query heads, K key-value heads, H head dim, D model, F ffn, V vocab, S context.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from phi3_jax import Phi3Config

from ..benchmark.roofline import decode_work


def parts(config: Phi3Config) -> list[dict[str, Any]]:
    """The parameters by part: its name, the formula in numbers, and the count; of phi-3-mini they sum to 3.8e9."""
    c, L, D, H, F = config, config.num_hidden_layers, config.hidden_size, config.head_dim, config.intermediate_size
    V, N, K = c.vocab_size, c.num_attention_heads, c.num_key_value_heads

    def part(name: str, formula: str, count: int) -> dict[str, Any]:
        return {"part": name, "formula": formula, "count": count}

    return [
        part("embedding", f"{V} x {D}", V * D),
        part("queries", f"{L} layers x {N} heads x {H} x {D}", L * N * H * D),
        part("keys and values", f"{L} layers x 2 x {K} heads x {H} x {D}", 2 * L * K * H * D),
        part("attention output", f"{L} layers x {D} x {N} heads x {H}", L * D * N * H),
        part("MLP gate and up", f"{L} layers x 2 x {F} x {D}", 2 * L * F * D),
        part("MLP down", f"{L} layers x {D} x {F}", L * D * F),
        part("norms", f"({L} layers x 2 + 1) x {D}", (2 * L + 1) * D),
        part("output head", "the embedding again", 0)
        if c.tie_word_embeddings
        else part("output head", f"{V} x {D}", V * D),
    ]


def model_section(config: Phi3Config, name: str, weights: str) -> dict[str, Any]:
    """The sizes, and where the parameters are; `weights` says what they are kept as."""
    c, counted = config, parts(config)
    return {
        "name": name,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "width": c.hidden_size,
        "ffn": c.intermediate_size,
        "vocab": c.vocab_size,
        "context": c.max_position_embeddings,
        "window": c.sliding_window,
        "tied": c.tie_word_embeddings,
        "weights": weights,
        "parameters": counted,
        "total": sum(part["count"] for part in counted),
    }


def cache_bytes(config: Phi3Config, dtype: Any) -> int:
    """Bytes that the keys and values of one token take in all layers; int8 has a float32 scale for each head's."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def token_work(config: Phi3Config, context: int, weight_bytes: int, dtype: Any) -> dict[str, Any]:
    """What writing one token takes behind `context` others (roofline.py): bytes read, products and sums.

    Args:
      weight_bytes: of the weights that a token reads: all but an embedding that is not the head as well.
      dtype: of the cache.
    """
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    work = decode_work(config, context, 1, 1, weight_bytes, cache_bytes(config, dtype) / numbers)
    return {
        "context": context,
        "weight_bytes": weight_bytes,
        "cache_bytes": round(work.bytes - weight_bytes),
        "flops": round(work.linear + work.attention),
        "flops_of_weights": round(work.linear),
        "flops_of_attention": round(work.attention),
    }

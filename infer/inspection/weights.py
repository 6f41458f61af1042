"""A model without a prompt: where its parameters are."""

from __future__ import annotations

from typing import Any

import flax.traverse_util
import jax

from phi3_jax import Phi3Config
from phi3_jax.checkpoint import kind_of_weights
from phi3_jax.kernels import LoraTensor, PackedTensor


def parts(config: Phi3Config) -> list[dict[str, Any]]:
    """The parameters by part: its name, the formula in numbers, and the count ("3.8B from where").

    >>> sum(part["count"] for part in parts(phi3_jax.PRESETS["phi-3-mini"]))
    3821079552
    """
    c = config
    L, D, N, K, H, F = (
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.intermediate_size,
    )

    def part(name: str, formula: str, count: int) -> dict[str, Any]:
        return {"part": name, "formula": formula, "count": count}

    head = "the embedding again" if c.tie_word_embeddings else f"{c.vocab_size} x {D}"
    return [
        part("embedding", f"{c.vocab_size} x {D}", c.vocab_size * D),
        part("queries", f"{L} layers x {N} heads x {H} x {D}", L * N * H * D),
        part("keys and values", f"{L} layers x 2 x {K} heads x {H} x {D}", 2 * L * K * H * D),
        part("attention output", f"{L} layers x {D} x {N} heads x {H}", L * D * N * H),
        part("MLP gate and up", f"{L} layers x 2 x {F} x {D}", 2 * L * F * D),
        part("MLP down", f"{L} layers x {D} x {F}", L * D * F),
        part("norms", f"({L} layers x 2 + 1) x {D}", (2 * L + 1) * D),
        part("output head", head, 0 if c.tie_word_embeddings else c.vocab_size * D),
    ]


def kind(params: Any) -> str:
    """What the weights are: "float32", "int4", "int8 with an adapter", ..."""
    leaves = list(
        flax.traverse_util.flatten_dict(params, is_leaf=lambda _, leaf: not isinstance(leaf, dict), sep="/").values()
    )
    attached = any(
        isinstance(leaf, LoraTensor)
        for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LoraTensor))
    )
    name = kind_of_weights(params) or next(
        (leaf.kind for leaf in leaves if isinstance(leaf, PackedTensor)),
        str(params["embed_tokens"]["weight"].dtype),
    )
    return f"{name} with an adapter" if attached else name

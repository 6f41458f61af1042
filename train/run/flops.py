"""How much arithmetic a step needs, for the model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B).

Only operations that are necessary count: padding, and what `remat` computes again, are left out.

Axis letters: A batches of a step, B rows, T tokens, L layers, N heads, H head dim.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from phi3_jax.adapters import adapter_shapes
from phi3_jax.config import Phi3Config
from phi3_jax.model import parameter_shapes

from ..data import Batch, Pair
from ..settings import Settings, adapter_config


def step_flops(settings: Settings, config: Phi3Config, batch: Batch | Pair) -> float:
    """The operations (products and sums) of one step on a batch of numpy arrays [A, B, T].

    Each weight of a matrix takes a product and a sum per token in the forward pass, as many for the gradient of the
    input, and as many again for its own gradient, if it has one. Attention takes 4 L N H operations for each pair of a
    token and one that it sees, and twice that in the backward pass.
    """
    parts = jax.tree.leaves(batch, is_leaf=lambda leaf: isinstance(leaf, Batch))
    positions = np.concatenate([np.asarray(part.positions).reshape(-1) for part in parts])
    positions = positions[positions >= 0]
    seen = np.minimum(positions + 1, config.sliding_window or positions + 1).sum(dtype=float)
    per_token, per_pair = _rates(settings, config)
    return per_token * len(positions) + per_pair * float(seen)


@functools.cache
def _rates(settings: Settings, config: Phi3Config) -> tuple[float, float]:
    """Operations for each token in the matrices, and in attention for each pair of a token and one that it sees."""
    # An embedding multiplies nothing, unless it is the output head as well.
    head = "embed_tokens/weight" if config.tie_word_embeddings else "lm_head/weight"
    shapes = parameter_shapes(config)
    matrices = sum(math.prod(shape) for path, shape in shapes.items() if path == head or "proj" in path)
    if settings.train == "all":
        linear = 6.0 * matrices
    else:
        lora = adapter_config(settings)
        # Of an embedding's update, rows of b are looked up, but for a head that is tied to it.
        parts = {path: math.prod(shape) for path, shape in adapter_shapes(config, lora).items()}
        adapter = sum(size for path, size in parts.items() if lora.tied or path != "embed_tokens/b")
        linear = 4.0 * matrices + 6.0 * adapter
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    if settings.method == "dpo":  # the forward pass of the model at the start
        linear, attention = linear + 2.0 * matrices, attention * 4 / 3
    return linear, attention

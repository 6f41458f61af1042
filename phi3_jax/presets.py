"""The sizes of the published Phi-3 and Phi-4 models, for random weights, benchmarks and memory estimates.

A checkpoint has its own configuration. Values that only a checkpoint has are missing here: LongRoPE's factors (all 1
below) and the ids of special tokens.
"""

from __future__ import annotations

import dataclasses

from phi3_jax.config import LongRope, Phi3Config


def _long_rope(frequencies: int) -> LongRope:
    return LongRope((1.0,) * frequencies, (1.0,) * frequencies, original_max_position_embeddings=4096)


_MINI = Phi3Config(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=96,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    sliding_window=2047,
)
_MEDIUM = Phi3Config(
    vocab_size=32064,
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
    head_dim=128,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    sliding_window=2047,
)
_MINI_LONG = dataclasses.replace(_MINI, max_position_embeddings=131072, sliding_window=262144, long_rope=_long_rope(48))
_PHI_4 = dataclasses.replace(
    _MEDIUM, vocab_size=100352, max_position_embeddings=16384, rope_theta=250000.0, sliding_window=None
)

PRESETS: dict[str, Phi3Config] = {
    "phi-3-mini": _MINI,  # an alias of the next one
    "phi-3-mini-4k": _MINI,
    "phi-3-mini-128k": _MINI_LONG,
    "phi-3.5-mini": _MINI_LONG,
    "phi-3-medium-4k": _MEDIUM,
    "phi-3-medium-128k": dataclasses.replace(
        _MEDIUM, max_position_embeddings=131072, sliding_window=131072, long_rope=_long_rope(64)
    ),
    "phi-4": _PHI_4,
    "phi-4-reasoning": dataclasses.replace(_PHI_4, max_position_embeddings=32768, rope_theta=500000.0),
    "phi-4-mini": dataclasses.replace(
        _MINI_LONG,
        vocab_size=200064,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
}

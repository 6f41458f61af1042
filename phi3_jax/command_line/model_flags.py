"""The flags by which every program names a model."""

from __future__ import annotations

from absl import flags

import phi3_jax

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "demo",
    "A Hugging Face folder, a .gguf file, a hub id such as microsoft/Phi-3-mini-4k-instruct, or demo.",
)
QUANTIZE = flags.DEFINE_string(
    "quantize",
    None,
    "Keep weights as integers: int8, int4, int4-mixed (the head and the most sensitive matrices at 8 bits), or with "
    "details such as int4-g64-asymmetric; stored keeps those of a GGUF file.",
)
ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "A folder, or a hub id, of a LoRA adapter in PEFT's format, which is added to the weights before they are rounded.",
)


def require_tokenizer(checkpoint: phi3_jax.Checkpoint) -> phi3_jax.Tokenizer:
    """The checkpoint's tokenizer. Raises ValueError if it has none."""
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{CHECKPOINT.value}: no tokenizer.json or tokenizer.model there; put one of them beside the weights"
        )
    return checkpoint.tokenizer

"""The flags by which every program names a model."""

from __future__ import annotations

from absl import flags

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "demo",
    "A Hugging Face folder, a .gguf file, demo, or a hub id such as microsoft/Phi-3-mini-4k-instruct, after which "
    "@REVISION may name a branch, tag or commit.",
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
    "A folder, or a hub id, of a LoRA adapter in PEFT's format. It is merged into weights that are floats, and "
    "attached to integers, which stay as they are. (phi3-quantize merges it in any case, and rounds the sum.)",
)

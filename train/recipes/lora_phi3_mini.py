"""Phi-3-mini in bfloat16 learns an adapter from chats of your own, chats.jsonl and held_out.jsonl here.

    phi3-train --recipe phi3_jax.train.recipes.lora_phi3_mini
    phi3-chat --checkpoint microsoft/Phi-3-mini-4k-instruct --adapter runs/lora_phi3_mini/adapter

Hardware: one accelerator with 16 GB. On a CPU, XLA multiplies in float32, and keeps a float32 copy of the weights: it
    needs 25.5 GB at sequence_length=1024.
Memory: 9.1 GB, computed by XLA's compiler for an H100 and an RTX 4090 (jax 0.10.2), not measured. By hand: 3.82 G
    weights of 2 bytes are 7.64 GB; the adapter has 32 layers of 16 x (12288 + 6144 + 19456 + 11264) = 25.2 M weights,
    with Adam's two moments 12 bytes each, 0.30 GB. The other 1.2 GB are for one row of 2048 tokens: each layer's
    input, 2048 x 3072 x 2 bytes x 32 = 0.40 GB, is kept, all else is computed again; the logits of 1024 tokens are
    0.13 GB, with their gradient 0.26 GB; the rest is the adapter's gradient and one layer's activations. Attention
    has blocks of 8 million scores at a time, whatever the length.
Time: a step of 8 x 2048 tokens takes 6 operations for each weight and token, two of them for remat: 3.7e14, or 7 s at
    50 TFLOP/s and 1 s at 400. Not measured.
Expect: this depends on the data; the first record of metrics.jsonl has the held-out loss before training, and the
    checkpoint of the lowest one is kept. A step is 16384 tokens at most, so that 300 steps see 4.9 million.
"""

from phi3_jax.train.settings import Settings

SETTINGS = Settings(
    checkpoint="microsoft/Phi-3-mini-4k-instruct",
    output="runs/lora_phi3_mini",
    train_file="chats.jsonl",
    eval_file="held_out.jsonl",
    dtype="bfloat16",
    compute_dtype="bfloat16",
    sequence_length=2048,
    batch_size=1,
    accumulation=8,
    remat="full",
    lora_rank=16,
    lora_alpha=32,
    lr=2e-4,
    warmup_steps=20,
    steps=300,
)

"""Phi-4 in four bits learns an adapter (QLoRA, arXiv:2305.14314) from chats of your own.

    phi3-train --recipe phi3_jax.train.recipes.qlora_phi4
    phi3-evaluate --checkpoint microsoft/phi-4 --quantize int4 --adapter runs/qlora_phi4/adapter --data held_out.jsonl
    phi3-chat --checkpoint microsoft/phi-4 --quantize int4 --adapter runs/qlora_phi4/adapter

The adapter belongs to these integers, and stays beside them: without --quantize int4 it is another model.

Hardware: one accelerator with 24 GB, and 30 GB of disk for the checkpoint, which is rounded while it is read.
Memory: 12.3 GB, computed by XLA's compiler for an H100 and an RTX 4090 (jax 0.10.2), not measured. By hand: 14.66 G
    weights, of which the embedding's 0.51 G take 8.5 bits and the others 4.5 (a scale of 16 bits for each 32), are
    8.50 GB; the adapter has 40 layers of 16 x (12800 + 10240 + 40960 + 23040) = 55.7 M weights, with Adam's two
    moments 12 bytes each, 0.67 GB. The other 3.1 GB are for one row of 2048 tokens: each layer's input, 2048 x 5120 x
    2 bytes x 40 = 0.84 GB, is kept, all else is computed again; one layer's matrices are floats while they multiply,
    35840 x 5120 x 2 bytes = 0.37 GB the largest; the logits of 1024 tokens are 0.41 GB, with their gradient 0.82 GB;
    the adapter's gradient is 0.22 GB. Attention has blocks of 8 million scores at a time, whatever the length.
Time: a step of 8 x 2048 tokens takes 6 operations for each weight and token, two for remat: 1.4e15, or 29 s at
    50 TFLOP/s and 4 s at 400, and somewhat more to dequantise. Not measured.
Expect: this depends on the data; the first record of metrics.jsonl has the held-out loss of the rounded model before
    training, and the checkpoint of the lowest one is kept. A step is 16384 tokens at most, so that 300 steps see 4.9
    million.
"""

from phi3_jax.train.settings import Settings

SETTINGS = Settings(
    checkpoint="microsoft/phi-4",
    output="runs/qlora_phi4",
    train_file="chats.jsonl",
    eval_file="held_out.jsonl",
    quantize="int4",
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

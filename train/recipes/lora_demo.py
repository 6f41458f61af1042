"""The demo model learns to answer questions about countries in one style: `make finetune-demo`.

    phi3-fetch-data --data factbook
    phi3-train --recipe phi3_jax.train.recipes.lora_demo
    phi3-chat --checkpoint demo --adapter runs/lora_demo/adapter

Hardware: two cores of a CPU.
Memory: 3.4 GB.
Time: 4 minutes, with 48 steps of 4.0 s (Xeon of the Sapphire Rapids generation).
Expect: held-out loss 4.39 before, 0.27 after. Of 22 trained facts that are asked for in the held-out form, all are then
    answered in the style and 18 correctly; of 11 facts that were not trained on, all in the style and 5 correctly.
"""

from phi3_jax.train.settings import Settings

SETTINGS = Settings(
    checkpoint="demo",
    output="runs/lora_demo",
    train_file="data/factbook/train.jsonl",
    eval_file="data/factbook/held_out.jsonl",
    sequence_length=128,
    batch_size=8,
    train="lora",
    lora_rank=16,
    lora_alpha=32,
    lr=1e-3,
    warmup_steps=5,
    steps=48,
    eval_every=16,
    save_every=16,
)

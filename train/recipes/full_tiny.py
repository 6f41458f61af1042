"""A model of 3 million weights, with a vocabulary of its own, learns from nothing to write like the Bible.

    phi3-fetch-data --data bible
    phi3-train --recipe phi3_jax.train.recipes.full_tiny
    phi3-generate --checkpoint runs/full_tiny/model --prompt "Jesus said to them," --temperature 0.7

Hardware: two cores of a CPU.
Memory: 0.5 GB.
Time: 4 minutes, with 350 steps of 0.5 to 0.9 s (Xeon of the Sapphire Rapids generation).
Expect: held-out loss 7.67 before (guessing among 2048 tokens is 7.62), 4.98 after 140 steps, 4.52 at the end: it writes
    pieces of biblical sentences. That is two thirds of an epoch; steps=2000 would be nearly four.
"""

from phi3_jax.train.settings import Settings

SETTINGS = Settings(
    checkpoint="data/bible/model",
    output="runs/full_tiny",
    train_file="data/bible/train.jsonl",
    eval_file="data/bible/held_out.jsonl",
    train="all",
    sequence_length=256,
    batch_size=8,
    lr=3e-3,
    warmup_steps=30,
    weight_decay=0.1,
    beta2=0.95,
    steps=350,
    log_every=10,
    eval_every=70,
    save_every=70,
)

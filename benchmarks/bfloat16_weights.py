"""What bfloat16 weights learn, rounded by chance or to the nearest number, beside float32 ones.

    python benchmarks/bfloat16_weights.py

A small model of bytes learns the Python of the standard library's json package in float32, and goes on with the English
of this project's documents, all weights, at low learning rates. The same batches in all runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import phi3_jax
from phi3_jax.train import step
from phi3_jax.train.data import Batch
from phi3_jax.train.rounding import apply_updates
from phi3_jax.train.settings import Settings

CONFIG = phi3_jax.Phi3Config(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rope_theta=1e4,
)
ROWS, LENGTH, FIRST, STEPS = 8, 64, 300, 300
DTYPES = {"float32": "float32", "by chance": "bfloat16", "to the nearest": "bfloat16"}


def text(paths: list[Path]) -> np.ndarray:
    """All their bytes."""
    return np.frombuffer(b"".join(path.read_bytes() for path in sorted(paths)), np.uint8).astype(np.int32)


def train(settings: Settings, params: Any, content: np.ndarray) -> tuple[Any, list[float]]:
    """Random pieces of the content -> (weights, losses)."""
    rng, losses = np.random.default_rng(0), []
    state, frozen = step.start(settings, CONFIG, params)
    take = step.make_train_step(settings, CONFIG)
    for _ in range(settings.steps):
        places = rng.integers(0, len(content) - LENGTH, ROWS)
        tokens = content[places[:, None] + np.arange(LENGTH)][None]
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        batch = Batch(tokens, np.ones(tokens.shape, np.float32), positions, np.zeros_like(tokens))
        state, metrics = take(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return state.trainable, losses


def main() -> None:
    """Prints one table."""
    python = text(list(Path(json.__file__).parent.glob("*.py")))
    english = text(list(Path(__file__).parents[1].glob("*.md")))
    s = Settings(train="all", batch_size=ROWS, sequence_length=LENGTH, lr=3e-3, steps=FIRST, schedule="constant")
    params, losses = train(s, phi3_jax.random_params(CONFIG), python)
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    print(f"first, on Python: {np.mean(losses[-20:]):.3f}\n")
    print("| lr | weights | moved | loss of steps 1-20 | 141-160 | 281-300 |")
    print("|---|---|---|---|---|---|")
    for lr in (1e-5, 1e-4, 1e-3):
        for name, dtype in DTYPES.items():
            step.apply_updates = apply_updates
            if name == "to the nearest":
                step.apply_updates = lambda old, updates, key: optax.apply_updates(old, updates)
            trained, losses = train(dataclasses.replace(s, dtype=dtype, lr=lr, steps=STEPS), rounded, english)
            moved = [np.asarray(new != old) for new, old in zip(*map(jax.tree.leaves, (trained, rounded)), strict=True)]
            share = sum(map(np.sum, moved)) / sum(leaf.size for leaf in moved)
            means = " | ".join(f"{np.mean(losses[begin : begin + 20]):.3f}" for begin in (0, 140, 280))
            print(f"| {lr:.0e} | {name} | {share:.1%} | {means} |", flush=True)


if __name__ == "__main__":
    main()

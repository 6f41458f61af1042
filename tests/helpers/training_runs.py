"""A tiny model with a tokenizer of bytes, and data, for the tests of runs."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from templates import PHI4_MINI, small_tokenizer

import phi3_jax
from phi3_jax.train.settings import Settings

CONFIG = phi3_jax.Phi3Config(
    vocab_size=263,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=1e4,
    long_rope=phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), 16),
    sliding_window=19,
    initializer_range=0.3,
)


def write_model(folder: Path) -> Path:
    """As a Hugging Face folder."""
    params = phi3_jax.random_params(CONFIG)
    generation = phi3_jax.GenerationSettings((257,))
    phi3_jax.save(phi3_jax.Checkpoint(CONFIG, params, small_tokenizer(PHI4_MINI), generation), folder)
    return folder


def write_data(path: Path, lines: int, seed: int) -> Path:
    """Chats about sums."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(lines):
            a, b = rng.randrange(50), rng.randrange(50)
            chat = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
            file.write(json.dumps({"messages": chat, "source": "sums"}) + "\n")
    return path


def write_run(folder: Path, **changes: Any) -> Settings:
    """Settings of a run in a folder that has all it needs."""
    model, trained, held_out = folder / "model", folder / "train.jsonl", folder / "eval.jsonl"
    if not model.exists():
        write_model(model)
        write_data(trained, 40, 1)
        write_data(held_out, 7, 2)
    settings = Settings(
        checkpoint=str(model),
        output=str(folder / "run"),
        train_file=str(trained),
        eval_file=str(held_out),
        sequence_length=29,
        batch_size=2,
        accumulation=2,
        lora_rank=3,
        lora_dropout=0.1,
        lr=1e-2,
        warmup_steps=2,
        steps=7,
        eval_every=3,
        save_every=2,
        samples=0,
    )
    return dataclasses.replace(settings, **changes)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors in a folder's safetensors file."""
    from safetensors.numpy import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)

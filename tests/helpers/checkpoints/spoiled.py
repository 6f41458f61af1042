"""Models that are damaged, and a small one with a sentencepiece vocabulary."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from vocabularies import train_sentencepiece, write

import phi3_jax

TEXT = "the cat sat on the mat\nthe other dog then bathed another moth\n" * 5
END = 2


def spoiled(checkpoint: phi3_jax.Checkpoint, name: str, where: tuple[int, ...], value: float) -> phi3_jax.Checkpoint:
    """The checkpoint with one number of the weight `name` (embed_tokens, norm, lm_head) replaced."""
    weight = jnp.asarray(checkpoint.params[name]["weight"]).at[where].set(value)
    return dataclasses.replace(checkpoint, params={**checkpoint.params, name: {"weight": weight}})


def with_bytes(tiny: phi3_jax.Checkpoint, folder: Path, **changes: int) -> phi3_jax.Checkpoint:
    """The tiny model's sizes, without LongRoPE, with byte tokens in the vocabulary, as in Phi-3's: b is token b + 3.

    Args:
      changes: of its configuration.
    """
    train_sentencepiece(folder / "tokenizer", TEXT, vocab_size=311, remove_extra_whitespaces=False)
    tokenizer = phi3_jax.load_tokenizer(write(folder, {}))
    assert tokenizer.pieces[3 + 0x0A] == "<0x0A>"
    config = dataclasses.replace(
        tiny.config, vocab_size=tokenizer.vocab_size, pad_token_id=0, long_rope=None, **changes
    )
    settings = phi3_jax.GenerationSettings((END,))
    return phi3_jax.Checkpoint(config, phi3_jax.random_params(config), tokenizer, settings, folder)

"""The obvious decoder that the compiled one is compared with: every token runs the whole model anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import phi3_jax

_WIDTH = 64  # everything is padded to it, to compile once


def logits(checkpoint: phi3_jax.Checkpoint, ids: Sequence[int], rope_length: int | None = None) -> jax.Array:
    """float32 [T, V]; rope_length is the number of tokens that LongRoPE goes by, if not T."""
    tokens = jnp.asarray([list(ids) + [0] * (_WIDTH - len(ids))])
    positions = jnp.where(jnp.arange(_WIDTH) < len(ids), jnp.arange(_WIDTH), -1)[None]
    rope_lengths = jnp.asarray([[len(ids) if rope_length is None else rope_length]])
    return _run(checkpoint.config, checkpoint.params, tokens, positions, rope_lengths)[0, : len(ids)]


def greedy(
    checkpoint: phi3_jax.Checkpoint, prompt: Sequence[int], count: int, rope_length: Callable[[int], int] = lambda n: n
) -> list[int]:
    """`count` new tokens; rope_length(tokens so far) is what LongRoPE goes by."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(checkpoint, ids, rope_length(len(ids)))[-1].argmax()))
    return ids[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _run(
    config: phi3_jax.Phi3Config, params: dict, tokens: jax.Array, positions: jax.Array, rope_lengths: jax.Array
) -> jax.Array:
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, positions, rope_lengths=rope_lengths)

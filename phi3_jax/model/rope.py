"""Rotary position embeddings (RoFormer, arXiv:2104.09864): plain, partial, and LongRoPE (arXiv:2402.13753).

Axis letters: B batch, T query, N heads, H head dim, R = rotary_dim/2 frequencies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config


def inverse_frequencies(config: Phi3Config) -> tuple[np.ndarray, np.ndarray]:
    """Radians per position of each frequency -> (short, long), float32 [R] each; equal without LongRoPE."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    wavelengths = np.float32(config.rope_theta) ** exponents
    if config.long_rope is None:
        return 1 / wavelengths, 1 / wavelengths
    short = 1 / (np.asarray(config.long_rope.short_factor, np.float32) * wavelengths)
    long = 1 / (np.asarray(config.long_rope.long_factor, np.float32) * wavelengths)
    return short, long


def attention_factor(config: Phi3Config) -> float:
    """The factor of cos and sin, at every length: LongRoPE's sqrt(1 + ln(factor) / ln(original)), else 1."""
    rope = config.long_rope
    if rope is None:
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    scale = rope.factor or config.max_position_embeddings / rope.original_max_position_embeddings
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(rope.original_max_position_embeddings))


def cos_sin(
    config: Phi3Config, positions: jax.Array, lengths: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      positions: int32 [B, T]; negative (padding) counts as 0.
      lengths: int32, broadcastable to [B, T]: the number of tokens of the sequence that each token belongs to. LongRoPE
        uses its long factors for every token of a sequence longer than `original_max_position_embeddings`.
      dtype: of the result; the angles themselves are float32.

    Returns:
      (cos, sin), each [B, T, R].
    """
    short, long = inverse_frequencies(config)
    frequencies = jnp.asarray(short)
    if config.long_rope is not None:
        is_long = lengths > config.long_rope.original_max_position_embeddings
        frequencies = jnp.where(is_long[..., None], long, short)
    # bf16 rounds 257 to 256: positions and angles stay in float32 and only the result is cast.
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * frequencies
    scale = attention_factor(config)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + R) of each head's first 2R dimensions; the others pass unchanged.

    Args:
      x: [B, T, N, H].
      cos, sin: [B, T, R] from `cos_sin`.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

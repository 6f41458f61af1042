"""Adam whose moments take one byte each (arXiv:2110.02861): numbers of a block share a scale.

As in the paper, there are blocks, so that a large number costs only its own block precision, and codes lie closer
together near 0, where most moments are. The paper's table of codes is replaced: a first moment is code**2 and a second
moment is code**4, times the scale. This resolves 6e-5 and 2e-10 of the largest number of a block.

Axis letters: I the last axis of a leaf, A = I / BLOCK rounded up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Numbers of one byte each.

    Attributes:
      values: int8 [..., I], whose sign is the number's; or uint8 for numbers that are at least 0.
      scales: float32 [..., A]: the largest magnitude of each block.
    """

    values: jax.Array
    scales: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adam8BitState:
    """What is kept between updates.

    Attributes:
      count: int32, the updates so far.
      mu, nu: the first and second moments, trees of Codes like the parameters.
    """

    count: jax.Array
    mu: Any
    nu: Any


def encode(x: jax.Array, signed: bool) -> Codes:
    """float32 [..., I] -> one byte each; without sign, a number that is not 0 does not become 0."""
    I = x.shape[-1]  # noqa: E741 - an axis letter
    blocks = _blocks(x)
    scales = jnp.abs(blocks).max(axis=-1)
    # A block of only zeros has scale 0.
    relative = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    if signed:
        codes = jnp.round(jnp.sign(relative) * jnp.sqrt(jnp.abs(relative)) * 127).astype(jnp.int8)
    else:
        rounded = jnp.round(jnp.sqrt(jnp.sqrt(relative)) * 255)
        # A second moment that becomes 0 would make the update huge if the first moment is not 0.
        codes = jnp.where(relative > 0, jnp.maximum(rounded, 1), 0).astype(jnp.uint8)
    return Codes(codes.reshape(*x.shape[:-1], -1)[..., :I], scales)


def decode(codes: Codes) -> jax.Array:
    """What `encode` was given, rounded: float32 [..., I]."""
    I = codes.values.shape[-1]  # noqa: E741 - an axis letter
    blocks = _blocks(codes.values.astype(jnp.float32))
    if codes.values.dtype == jnp.int8:
        relative = blocks * jnp.abs(blocks) * (1 / 127) ** 2
    else:
        relative = jnp.square(jnp.square(blocks * (1 / 255)))
    x = relative * codes.scales[..., None]
    return x.reshape(*codes.values.shape[:-1], -1)[..., :I]


def scale_by_adam8bit(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, with moments of one byte."""

    def init(params: Any) -> Adam8BitState:
        def zeros(signed: bool) -> Any:
            return jax.tree.map(lambda leaf: encode(jnp.zeros(leaf.shape, jnp.float32), signed), params)

        return Adam8BitState(jnp.zeros([], jnp.int32), zeros(True), zeros(False))

    def update(gradients: Any, state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        count = optax.safe_increment(state.count)
        c1, c2 = 1 - beta1**count, 1 - beta2**count

        def of_leaf(g: jax.Array, mu: Codes, nu: Codes) -> tuple[jax.Array, Codes, Codes]:
            m = beta1 * decode(mu) + (1 - beta1) * g
            v = beta2 * decode(nu) + (1 - beta2) * g * g
            return m / c1 / (jnp.sqrt(v / c2) + epsilon), encode(m, True), encode(v, False)

        done = jax.tree.map(of_leaf, gradients, state.mu, state.nu)
        updates, mu, nu = (jax.tree.map(lambda _, three, i=i: three[i], gradients, done) for i in range(3))
        return updates, Adam8BitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., I] -> [..., A, BLOCK], filled up with zeros."""
    padded = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % BLOCK),))
    return padded.reshape(*x.shape[:-1], -1, BLOCK)

"""Cross-entropy of the next tokens, in float32, without ever holding the logits of a whole batch.

Axis letters: B rows, T tokens, D model, V vocab, C chunks, W columns of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .data import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSums:
    """Sums over the learned tokens of each row, each float32 [B] and weighted by `Batch.weights`.

    Attributes:
      loss: of the loss.
      weight: of the weights themselves.
      correct: of the tokens that are the most likely ones.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def cross_entropy(
    logits: jax.Array, targets: jax.Array, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, and whether it is the most likely one.

    With Z the sum of exp(logits), the loss is -log p(target) + z_loss * (log Z)**2 (PaLM, arXiv:2204.02311). Label
    smoothing (arXiv:1512.00567) mixes the target, of weight 1 - label_smoothing, with a uniform distribution over all
    tokens, as `torch.nn.functional.cross_entropy` does.

    Args:
      logits: float32 [..., V].
      targets: int32 [...].

    Returns:
      (loss float32 [...], bool [...]).
    """
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = target
    if label_smoothing:
        wanted = (1 - label_smoothing) * target + label_smoothing * logits.mean(axis=-1)
    loss = log_z - wanted
    if z_loss:
        loss += z_loss * log_z**2
    # An argmax takes XLA several times as long as this maximum, which the sum of exponentials needs, too.
    return loss, target >= jax.lax.stop_gradient(logits).max(axis=-1)


def next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each column predicts -> (tokens int32 [B, T], weights float32 [B, T]).

    A weight is 0 if the next token is of another segment, is padding, or does not exist, whatever `Batch.weights` says.
    """
    follows = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.positions[:, 1:] > 0)
    weights = jnp.where(follows, batch.weights[:, 1:], 0.0)
    last = ((0, 0), (0, 1))
    return jnp.pad(batch.tokens[:, 1:], last), jnp.pad(weights, last)


def row_sums(
    unembed: Callable[..., jax.Array],
    x: jax.Array,
    batch: Batch,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    numbered: bool = False,
) -> RowSums:
    """The loss of a batch, summed over each row's tokens.

    Args:
      unembed: x [..., D] -> logits float32 [..., V]; it may depend on values that are differentiated.
      x: [B, T, D], what goes into the output head.
      batch: the tokens.
      chunk: how many tokens' logits are held at a time (rounded down to whole columns of the batch, at least one); the
        backward pass computes them again. 0: those of all tokens, which are kept for the backward pass.
      numbered: `unembed` is given the chunk's number, too: what is random in it must not be the same in all of them.
    """

    def part(x: jax.Array, targets: jax.Array, weights: jax.Array, *number: jax.Array) -> RowSums:
        loss, correct = cross_entropy(unembed(x, *number), targets, z_loss, label_smoothing)
        # 0 * inf is not 0: tokens that are not learned must not count, even if their loss is infinite.
        return RowSums(jnp.where(weights > 0, weights * loss, 0).sum(1), weights.sum(1), (weights * correct).sum(1))

    B, T = batch.tokens.shape
    targets, weights = next_tokens(batch)
    W = max(1, chunk // B) if chunk else T
    if W >= T:
        return part(x, targets, weights, *([jnp.int32(0)] if numbered else []))
    C = -(-T // W)

    def in_chunks(leaf: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf, ((0, 0), (0, C * W - T)) + ((0, 0),) * (leaf.ndim - 2))
        return padded.reshape(B, C, W, *leaf.shape[2:]).swapaxes(0, 1)  # [C, B, W, ...]

    def add(sums: RowSums, columns: tuple[jax.Array, ...]) -> tuple[RowSums, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(part, prevent_cse=False)(*columns)), None

    zeros = jnp.zeros(B, jnp.float32)
    columns = [*map(in_chunks, (x, targets, weights)), *([jnp.arange(C)] if numbered else [])]
    return jax.lax.scan(add, RowSums(zeros, zeros, zeros), tuple(columns))[0]

"""The log-probabilities of texts, token by token, which all evaluations are made of.

Axis letters: B rows, T tokens, D model, V vocab, C chunks, W columns of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model import Phi3
from phi3_jax.progress import OnProgress

_LOGITS = 1024  # tokens whose logits are held at a time
_BATCH_TOKENS = 4096  # tokens of a batch: the longer the rows, the fewer
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A text in token ids, of which those from `begin` on are to be scored; the very first token cannot be."""

    ids: Sequence[int]
    begin: int


@dataclasses.dataclass(frozen=True)
class Score:
    """Of the scored tokens of a request.

    Attributes:
      logprobs: float32 [n], natural logarithms.
      greedy: whether each of them was the most likely token.
    """

    logprobs: np.ndarray
    greedy: bool


def score(checkpoint: Checkpoint, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Score]:
    """Scores texts, each on its own; in batches of similar lengths, so that few programs are compiled.

    Args:
      on_progress: called with (requests done, requests in all).

    Raises:
      ValueError: a text is longer than the model's context, or has ids outside of the vocabulary; the model's
        numbers are not finite.
    """
    _check(checkpoint.config, requests)
    scores: dict[int, Score] = {}
    longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    while longest_first:
        T = max(_SHORTEST, 1 << (len(requests[longest_first[0]].ids) - 1).bit_length())
        B = max(1, _BATCH_TOKENS // T)
        batch, longest_first = longest_first[:B], longest_first[B:]
        tokens, positions = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
        for row, i in enumerate(batch):
            n = len(requests[i].ids)
            tokens[row, :n], positions[row, :n] = requests[i].ids, np.arange(n)
        logprobs, greedy = jax.device_get(_score(checkpoint.config, checkpoint.params, tokens, positions))
        for row, i in enumerate(batch):
            scored = slice(max(1, requests[i].begin), len(requests[i].ids))
            if not np.isfinite(logprobs[row, scored]).all():
                raise ValueError(
                    f"text {i} has log-probabilities that are not finite: the weights may be damaged (download or "
                    "convert them again), or float16 overflowed (take float32 or bfloat16)"
                )
            scores[i] = Score(logprobs[row, scored], bool(greedy[row, scored].all()))
        if on_progress is not None:
            on_progress(len(scores), len(requests))
    return [scores[i] for i in range(len(requests))]


@functools.partial(jax.jit, static_argnums=0)
def _score(config: Phi3Config, params: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each token after those before it, float32 [B, T]; whether it was the most likely one)."""
    model = Phi3(config, walk="index")
    x: Any = model.apply({"params": params}, tokens, positions, method="hidden")[0]

    def of_columns(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = part  # [B, W, D], [B, W]
        logits: Any = model.apply({"params": params}, x, method="unembed")
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1), target >= logits.max(axis=-1)

    B, T = tokens.shape
    W = min(T, max(1, _LOGITS // B))
    C = T // W  # both are powers of two
    columns = (
        x.reshape(B, C, W, -1).swapaxes(0, 1),
        jnp.roll(tokens, -1, axis=1).reshape(B, C, W).swapaxes(0, 1),
    )
    logprobs, greedy = (each.swapaxes(0, 1).reshape(B, T) for each in jax.lax.map(of_columns, columns))
    return jnp.roll(logprobs, 1, axis=1), jnp.roll(greedy, 1, axis=1)


def _check(config: Phi3Config, requests: Sequence[Request]) -> None:
    longest = max((len(request.ids) for request in requests), default=0)
    if longest > config.max_position_embeddings:
        raise ValueError(f"a text has {longest} tokens, more than the model's {config.max_position_embeddings}")
    for request in requests:
        ids = np.asarray(request.ids)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ValueError(f"a text has no tokens, or ids outside of the vocabulary of {config.vocab_size}")

"""The log-probabilities of texts, token by token, which all evaluations are made of; by one of two paths.

"exact" is the model without a cache, as training computes it. "generation" is what `phi3_jax.infer` runs: the text is
read as a prompt, by the kernels where the weights are packed (these round activations), with keys and values in the
cache's own dtype.

Axis letters: B rows, T tokens, D model, V vocab, C chunks, W columns of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.infer import Options, Run, Sampling
from phi3_jax.kernels import has_packed
from phi3_jax.model import Phi3
from phi3_jax.progress import OnProgress

Path = Literal["exact", "generation"]
PATHS: tuple[Path, ...] = ("exact", "generation")

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


def usual_path(checkpoint: Checkpoint) -> Path:
    """The path that measures what runs: "generation" where weights are packed for the CPU kernels, else "exact"."""
    return "generation" if has_packed(checkpoint.params) else "exact"


def score(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    on_progress: OnProgress | None = None,
    path: Path | None = None,
) -> list[Score]:
    """Scores texts, each on its own; in batches of similar lengths, so that few programs are compiled.

    Args:
      on_progress: called with (requests done, requests in all).
      path: what computes them; None is the usual path.

    Raises:
      ValueError: a text is longer than the model's context, or has ids outside of the vocabulary; the exact path is
        asked for packed weights; a log-probability is not finite.
    """
    path = usual_path(checkpoint) if path is None else path
    if path not in PATHS:
        raise ValueError(f"path={path!r} is not one of {', '.join(PATHS)}")
    if path == "exact" and has_packed(checkpoint.params):
        raise ValueError(
            "packed weights have no exact path: load them with layout='rows' (a folder of them: write it with "
            "phi3-quantize --layout rows), or measure 'generation'"
        )
    _check(checkpoint.config, requests)
    batch_tokens, score_batch = (_BATCH_TOKENS, _exact) if path == "exact" else (_LOGITS, _generation)
    scores: dict[int, Score] = {}
    longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    while longest_first:
        T = max(_SHORTEST, 1 << (len(requests[longest_first[0]].ids) - 1).bit_length())
        B = max(1, batch_tokens // (T if path == "exact" else min(T, Options().prefill_chunk)))
        batch, longest_first = longest_first[:B], longest_first[B:]
        scores |= zip(batch, score_batch(checkpoint, [requests[i] for i in batch], B, T), strict=True)
        if bad := [i for i in batch if not np.isfinite(scores[i].logprobs).all()]:
            raise ValueError(
                f"text {min(bad)} has log-probabilities that are not finite: the weights may be damaged (download or "
                "convert them again), or float16 overflowed (take float32 or bfloat16)"
            )
        if on_progress is not None:
            on_progress(len(scores), len(requests))
    return [scores[i] for i in range(len(requests))]


def _exact(checkpoint: Checkpoint, requests: Sequence[Request], rows: int, length: int) -> list[Score]:
    # Padding is a token of the texts: a damaged row of the embedding that no text uses must not count.
    tokens = np.full((rows, length), requests[0].ids[0] if len(requests[0].ids) else 0, np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, request in enumerate(requests):
        n = len(request.ids)
        tokens[row, :n], positions[row, :n] = request.ids, np.arange(n)
    logprobs, greedy = jax.device_get(_score(checkpoint.config, checkpoint.params, tokens, positions))
    scores = []
    for row, request in enumerate(requests):
        scored = slice(max(1, request.begin), len(request.ids))
        scores.append(Score(logprobs[row, scored], bool(greedy[row, scored].all())))
    return scores


def _generation(checkpoint: Checkpoint, requests: Sequence[Request], rows: int, length: int) -> list[Score]:
    prompts = [list(request.ids) for request in requests]
    # A prompt leaves room for a token: where a text fills the context, its last one is what the answer begins with.
    last = [prompt.pop() if len(prompt) == checkpoint.config.max_position_embeddings else None for prompt in prompts]
    forced = [Sampling(forced_tokens=() if token is None else (token,)) for token in last]
    options = Options(logprobs=1, echo=True, room=length + 1, rows=rows)  # all batches run the same programs
    run = Run(checkpoint, prompts, [1] * len(prompts), forced, options)
    new = run.advance()
    while run.reading[0] < run.reading[1]:
        new = run.advance()
    scores = []
    for row, request in enumerate(requests):
        found = run.prompt_logprobs(row) + (new[row].logprobs or [] if last[row] is not None else [])
        scored, expected = found[max(1, request.begin) :], len(request.ids) - max(1, request.begin)
        # A run tells no log-probabilities from the first on that is no number.
        logprobs = [math.nan if each.logprob is None else each.logprob for each in scored]
        logprobs += [math.nan] * (expected - len(scored))
        greedy = all(value >= max(each.top.values(), default=0) for value, each in zip(logprobs, scored, strict=False))
        scores.append(Score(np.array(logprobs, np.float32), greedy))
    return scores


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

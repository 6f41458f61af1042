"""Where two models part: the same text through both, compared layer by layer. What int4 or a fine-tune has changed.

Axis letters: L layer, T token, D model, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.inspection import run
from phi3_jax.inspection.lens import guesses, in_steps, logits_of
from phi3_jax.model import Params

from ..engine.failures import NOT_FINITE_ADVICE
from ..prompts import check_prompt
from . import texts
from .rounding import rounded

TOP = 5
PARTED = 0.99  # the cosine of two residual streams below which models have parted


def compare(checkpoint: Checkpoint, other: Checkpoint, ids: Sequence[int], name: str = "") -> dict[str, Any]:
    """Runs a text through two models -> report["comparison"].

    Args:
      other: of the same vocabulary. An adapter is compared as a checkpoint to which it is attached.
      ids: T tokens.
      name: of the other model, for the report.

    Returns:
      JSON values: "name"; "kl" [T], the Kullback-Leibler divergence KL(checkpoint || other) of their distributions of
      the next token, in nats; "layers", of each layer {"cosine": [T] of the two residual streams after it, "kl": [T] of
      what the logit lens reads from them, through each model's own norm and head}; "parted", the first layer after
      which the cosine, averaged over the tokens, is below PARTED, or None; "top", the other's TOP most likely tokens
      after the last one as [id, probability]; "note", None, or why "layers" is empty: models of other sizes have no
      layers that belong together.

    Raises:
      ValueError: the vocabularies differ; the text is empty, has ids outside of it, or is too long; logits are not
        finite.
    """
    _check_vocabulary(checkpoint, other)
    for model in (checkpoint, other):
        check_prompt(model, ids, "the text")
    own, its = checkpoint.config, other.config
    note, layers = _why_no_layers(own, its), None
    tokens = np.asarray([ids], np.int32)
    if note is not None:
        layers = [-1]
    streams = [
        run(m.config, m.params, tokens, ("resid_post",), layers=layers)["resid_post"] for m in (checkpoint, other)
    ]
    kl = np.asarray(_divergence(own, checkpoint.params, streams[0], its, other.params, streams[1]))
    if not np.isfinite(kl[-1]).all():
        raise ValueError(f"the logits of one of the two models are not finite numbers: {NOT_FINITE_ADVICE}")
    found: list[dict[str, Any]] = []
    parted = None
    if note is None:
        cosine = np.asarray(_cosine(*streams))
        found = [{"cosine": rounded(c), "kl": rounded(k)} for c, k in zip(cosine, kl, strict=True)]
        below = np.flatnonzero(cosine.mean(axis=1) < PARTED)
        parted = int(below[0]) if len(below) else None
    top = guesses(its, other.params, streams[1][-1:, :, -1:], min(TOP, its.vocab_size), None)
    return {
        "name": name,
        "kl": rounded(kl[-1]),
        "layers": found,
        "parted": parted,
        "top": [[int(i), rounded(p)] for i, p in zip(top.ids[0, 0, 0], top.probabilities[0, 0, 0], strict=True)],
        "note": note,
    }


def _check_vocabulary(checkpoint: Checkpoint, other: Checkpoint) -> None:
    sizes = checkpoint.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"models of {sizes[0]} and {sizes[1]} tokens cannot be compared: they need one vocabulary")
    own, its = checkpoint.tokenizer, other.tokenizer
    if own is None or its is None:
        return
    pieces = [[texts.piece(tokenizer, i) for i in range(sizes[0])] for tokenizer in (own, its)]
    # Of rows that no text comes to, some files have names and others none.
    if differ := [i for i, (a, b) in enumerate(zip(*pieces, strict=True)) if None not in (a, b) and a != b]:
        i = differ[0]
        raise ValueError(
            f"token {i} is {pieces[0][i]!r} in one model and {pieces[1][i]!r} in the other: models that are compared "
            "need one vocabulary"
        )


def _why_no_layers(own: Phi3Config, other: Phi3Config) -> str | None:
    sizes = [(config.num_hidden_layers, config.hidden_size) for config in (own, other)]
    if sizes[0] == sizes[1]:
        return None
    (L, D), (its_L, its_D) = sizes
    return f"the other model has {its_L} layers of width {its_D}, this one {L} of {D}: only their outputs are compared"


@jax.jit
def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Streams [L, 1, T, D] -> [L, T]."""
    a, b = (x[:, 0].astype(jnp.float32) for x in (a, b))
    return (a * b).sum(-1) / jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@functools.partial(jax.jit, static_argnames=("own", "its"))
def _divergence(
    own: Phi3Config, params: Params, mine: jax.Array, its: Phi3Config, its_params: Params, theirs: jax.Array
) -> jax.Array:
    """KL of what the logit lens reads from streams [L, 1, T, D] of two models -> [L, T]; some tokens at a time."""
    L, _, T, _ = mine.shape

    def of_some(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        logs = jax.nn.log_softmax(logits_of(own, params, pair[0]))
        return (jnp.exp(logs) * (logs - jax.nn.log_softmax(logits_of(its, its_params, pair[1])))).sum(-1)

    return in_steps(of_some, (mine.reshape(L * T, -1), theirs.reshape(L * T, -1))).reshape(L, T)

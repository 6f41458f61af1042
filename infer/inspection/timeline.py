"""How an answer came about, token by token: a greedy run beside a sampled one, as plain values for a report.

Axis letters: L layer, B batch (one row), N query heads, T query (one token), S slot of the cache, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.inspection import entropy

from ..engine import Options
from ..sampling import Sampling
from . import texts
from .rounding import rounded
from .stepping import Step, steps

RUNNERS = 5


def timeline(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    new: int,
    temperature: float = 1.0,
    seed: int = 0,
    options: Options | None = None,
) -> dict[str, Any]:
    """Continues a prompt greedily and, with `temperature` and `seed`, by chance -> report["generation"].

    Args:
      new: the most new tokens of each run.
      options: as for `steps`.

    Returns:
      {"greedy": [step], "sampled": [step], "texts": {"greedy", "sampled"}, "temperature", "seed"}, JSON values; a step
      is {"id", "probability", "runners": [[id, probability]], "entropy", "looked"}. Probabilities are the model's own,
      softmax(logits), in both runs, before temperature: so the two can be compared. The runners are the RUNNERS most
      likely tokens but the one that was taken; the entropy is in nats. "looked" is the attention, averaged over all
      layers and heads, from the token before this one to each token so far, itself included, in thousandths.

    Raises:
      ValueError: as `steps`.
    """

    def run(sampling: Sampling) -> list[dict[str, Any]]:
        return [told(step) for step in steps(checkpoint, ids, new, ("attn.pattern",), (), sampling, options=options)]

    found = {"greedy": run(Sampling()), "sampled": run(Sampling(temperature=temperature, seed=seed))}
    written = {
        name: texts.joined(checkpoint.tokenizer, [step["id"] for step in those]) for name, those in found.items()
    }
    return {**found, "texts": written, "temperature": temperature, "seed": seed}


def told(step: Step) -> dict[str, Any]:
    """One step of a timeline; it must have read attn.pattern, of all layers and heads or of some."""
    looked = step.by_position(step.seen["attn.pattern"].mean(axis=(0, 1, 2, 3)))
    probability, ids, probabilities, open_ = map(np.asarray, _told(step.logits, step.token))
    return {
        "id": step.token,
        "probability": rounded(probability),
        "runners": [[int(token), rounded(p)] for token, p in zip(ids, probabilities, strict=True)],
        "entropy": rounded(open_),
        "looked": np.round(1000 * looked).astype(int).tolist(),
    }


@jax.jit
def _told(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of logits [V]: the token's probability, the runners' ids and probabilities, the entropy."""
    probabilities = jax.nn.softmax(logits)
    values, ids = jax.lax.top_k(probabilities.at[token].set(-1.0), min(RUNNERS, len(logits) - 1))
    return probabilities[token], ids, values, entropy(logits)

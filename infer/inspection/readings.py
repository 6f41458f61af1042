"""The run that a report is made of, and the one that finds heads which copy.

Axis letters: L layer, B batch (here 1), T token, N query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from phi3_jax import Checkpoint, KVCache, inspection

from ..engine.buckets import own_cache_dtype

Seen = dict[str, np.ndarray]
_READS = ("embed", "attn.z", "attn_out", "resid_mid", "mlp_out", "resid_post", "ln_final.out", "logits")
_COPIED = 24  # tokens that are read twice, to see which heads look at what came next the first time
_own_rows = jax.jit(inspection.token_rows)


def read(checkpoint: Checkpoint, ids: Sequence[int]) -> Seen:
    """Runs a prompt as the programs do -> values by the points' names (`POINTS` has their axes).

    Raises ValueError where what is read would take too much memory (`inspection.run`).
    """
    config, params, tokens = checkpoint.config, checkpoint.params, np.asarray([ids], np.int32)
    # Keys and values are rounded as where answers are generated: the numbers are those of phi3-generate.
    cache = KVCache.create(config, 1, len(ids), own_cache_dtype(checkpoint))
    seen, _ = inspection.run(config, params, tokens, _READS, cache=cache)
    # Of another run: with kernels for attention, which the programs use, its weights are nowhere in memory.
    weights, _ = inspection.run(config, params, tokens, ["attn.pattern"], cache=cache)
    found = {name: np.asarray(value) for name, value in (seen | weights).items()}
    found["attn.pattern"] = found["attn.pattern"][..., : len(ids)]  # a cache may have more slots than asked for
    return found


def last_attribution(checkpoint: Checkpoint, seen: Seen) -> inspection.Attribution:
    """What each part adds to the logit of the likeliest token behind the prompt."""
    places = {"embed": 1, "attn.z": 2, "mlp_out": 2, "resid_post": 2, "ln_final.out": 1, "logits": 1}
    last = {name: seen[name].take([-1], axis) for name, axis in places.items()}
    return inspection.attribution_of(checkpoint.config, checkpoint.params, last, None, None)


def last_rollout(seen: Seen) -> np.ndarray:
    """How much of the last token's place comes from each token (attention rollout), float [T]."""
    pattern = seen["attn.pattern"]
    return np.asarray(inspection.rolled(np.eye(pattern.shape[-1], dtype=np.float32)[None], pattern))[0, -1]


def head_scores(checkpoint: Checkpoint, ids: Sequence[int], seen: Seen) -> dict[str, np.ndarray]:
    """What heads look at in the prompt, and on a random sequence that is there twice; float [L, N] each."""
    config, tokens = checkpoint.config, np.asarray([ids], np.int32)
    found = inspection.pattern_scores(config, seen["attn.pattern"], tokens, np.arange(len(ids), dtype=np.int32)[None])
    # A window hides what lies further back; and two copies must fit into the context.
    length = min(_COPIED, config.sliding_window or _COPIED, config.max_position_embeddings // 2)
    once = np.random.default_rng(0).integers(0, config.vocab_size, length)
    copied = inspection.head_scores(config, checkpoint.params, np.tile(once, 2)[None])
    scores = found._replace(induction=copied.induction)
    return {name: np.asarray(value) for name, value in scores._asdict().items()}


@jax.jit
def told(logits: Any, tokens: Any) -> tuple[jax.Array, jax.Array]:
    """(surprise of each token, entropy of what is expected behind it): logits [B, T, V], tokens [B, T] -> [B, T]."""
    return inspection.surprise(logits, tokens), inspection.entropy(logits)


def nearest(checkpoint: Checkpoint, ids: Sequence[int], most: int) -> list[list[tuple[int, float]]]:
    """For each token those whose embeddings point most nearly where its own does, and the cosines; not itself."""
    config, params = checkpoint.config, checkpoint.params
    most = min(most, config.vocab_size - 1)
    vectors = _own_rows(params, np.asarray(ids, np.int32))
    near, cosines = (np.asarray(each).tolist() for each in inspection.nearest(config, params, vectors, top=most + 1))
    found = [list(zip(*row, strict=True)) for row in zip(near, cosines, strict=True)]
    return [[pair for pair in row if pair[0] != own][:most] for own, row in zip(ids, found, strict=True)]

"""Vectors that turn a model's answers: the difference of two texts' residual streams, added while it runs.

Axis letters: B batch, T query, D model, P chosen positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import add
from phi3_jax.inspection.running import run
from phi3_jax.model import Params
from phi3_jax.model.points import OUTER, POINTS, Edit, plain_name


def steering_vector(
    config: Phi3Config,
    params: Params,
    tokens_with: Any,
    tokens_without: Any,
    layer: int,
    *,
    strength: float = 1.0,
    point: str = "resid_post",
    positions: Any = None,
    positions_with: Any = None,
    positions_without: Any = None,
    at: Any = None,
) -> Edit:
    """An edit that adds strength * (mean of the texts with - mean of those without) to a layer's residual stream.

    Of many pairs of texts that differ in their last token, with `positions=(-1,)`, it is contrastive activation
    addition (arXiv:2312.06681). Activation addition (arXiv:2308.10248) is the same of one pair, but adds each place's
    difference at that place, where this adds the mean.

    Args:
      tokens_with, tokens_without: int [B, T]; the two need not have the same B and T.
      layer: a negative number counts from the end.
      point: of the residual stream, whose value is a vector for each token.
      positions: the places along T that are averaged, negative ones from the end; None averages all tokens.
      positions_with, positions_without: the tokens' positions, int32 [B, T], -1 for padding.
      at: the positions of tokens at which the edit adds; None means all.

    Raises:
      ValueError: a point of another kind; what `run` and `add` raise.
    """
    point = plain_name(point)
    if point in OUTER or POINTS.get(point) != "BTD":
        raise ValueError(
            f"{point} is no vector for each token of a layer: name resid_post, or another with the axes LBTD"
        )
    means = [
        _mean(config, params, tokens, layer, point, positions, token_positions)
        for tokens, token_positions in ((tokens_with, positions_with), (tokens_without, positions_without))
    ]
    at = None if at is None else jnp.asarray(at, jnp.int32)
    return add(config, point, strength * (means[0] - means[1]), layers=[layer], positions=at)


def _mean(
    config: Phi3Config, params: Params, tokens: Any, layer: int, point: str, positions: Any, token_positions: Any
) -> jax.Array:
    """The mean [D] over texts of each text's mean over its tokens."""
    options: Any = {"positions": positions, "token_positions": token_positions}
    x = run(config, params, tokens, [point], layers=[layer], **options)[point][0].astype(jnp.float32)  # [B, P, D]
    counts = jnp.ones(x.shape[:2])
    if token_positions is not None:
        where = jnp.arange(x.shape[1])[None] if positions is None else jnp.atleast_2d(jnp.asarray(positions))
        places = jnp.broadcast_to(jnp.asarray(token_positions), jnp.shape(tokens))
        counts = jnp.take_along_axis(places, where % places.shape[1], axis=1) >= 0
    weights = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("BPD,BP->D", x, weights, precision=jax.lax.Precision.HIGHEST) / x.shape[0]

"""How a number that is computed from the logits changes with the values at the points.

Axis letters: L layer, B batch, T query, V vocab, P chosen positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import Numbers, as_data
from phi3_jax.inspection.running import LIMIT, Seen, at_places, check_size, chosen, hidden, logits, placed, places
from phi3_jax.kernels import has_packed, has_per_layer
from phi3_jax.model import Params
from phi3_jax.model.decoder import Remat
from phi3_jax.model.points import Edit, Hooks


class Gradients(NamedTuple):
    """What `gradients` returns.

    Attributes:
      metric: float scalar.
      values: what was read, as `run` returns it.
      slopes: the metric's gradient with respect to each of the values, of the same shapes and types.
    """

    metric: jax.Array
    values: Seen
    slopes: Seen


def gradients(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    metric: Callable[[jax.Array], jax.Array],
    reads: Sequence[str],
    *,
    layers: Numbers = None,
    positions: Any = None,
    heads: Numbers = None,
    edits: Sequence[Edit] = (),
    token_positions: Any = None,
    segments: Any = None,
    rope_lengths: Any = None,
    logits_at: Any = None,
    limit: int = LIMIT,
) -> Gradients:
    """Runs tokens through the model and back: the values at points, and the metric's gradient with respect to them.

    A key or value that is read for several query heads has its whole gradient at each of them.

    Args:
      params: of any kind; those of the CPU kernels are multiplied as XLA does it on the way back.
      metric: of the logits, float32 [B, P, V], a scalar; jax must trace it. Another function needs another program; one
        with numbers that change is `jax.tree_util.Partial(function, numbers)`: function(numbers, logits).
      logits_at: the places along T whose logits the metric gets, [P] or [B, P], negative ones from the end; None is
        all T of them.
      others: see `run`.

    Raises:
      ValueError: see `run`.
    """
    tokens = jnp.asarray(tokens)
    hooks = chosen(config, tokens, reads, layers, positions, heads, edits)
    check_size(hooks, config, params, tokens.shape, tokens.shape[1], limit // 2)
    at = None if logits_at is None else places(logits_at, tokens.shape)
    token_positions, segments, rope_lengths = placed(tokens, token_positions, segments, rope_lengths)
    return _compiled(config, params, tokens, as_data(metric), at, hooks, token_positions, segments, rope_lengths)


@functools.partial(jax.jit, static_argnames="config")
def _compiled(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    metric: Callable[[jax.Array], jax.Array],
    logits_at: jax.Array | None,
    hooks: Hooks,
    token_positions: jax.Array | None,
    segments: jax.Array | None,
    rope_lengths: jax.Array | None,
) -> Gradients:
    # On the way back packed weights are made floats: one layer's at a time, where layers are computed again.
    remat: Remat = "full" if has_packed(params) and not has_per_layer(params) else "none"
    others = {"segments": segments, "rope_lengths": rope_lengths}

    def forward(probes: Seen) -> tuple[jax.Array, Seen]:
        asked = dataclasses.replace(hooks, probes=probes)
        x, spots, values, _ = hidden(config, params, tokens, token_positions, None, asked, remat, **others)
        if "logits" in hooks.reads or hooks.changes("logits"):
            out, values = logits(config, params, x, spots, asked, values)
            return metric(at_places(out, logits_at)), values
        x, spots = at_places(x, logits_at), at_places(spots, logits_at)
        return metric(logits(config, params, x, spots, asked, values)[0]), values

    empty = jax.eval_shape(forward, {})[1]
    probes = {name: jnp.zeros(value.shape, value.dtype) for name, value in empty.items()}
    (number, values), slopes = jax.value_and_grad(forward, has_aux=True)(probes)
    return Gradients(number, values, slopes)

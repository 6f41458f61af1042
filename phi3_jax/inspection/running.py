"""A run of which values are read, and in which some are changed.

Axis letters: L layer, B batch, T query, S key, D model, V vocab, P chosen positions.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import Numbers, numbers
from phi3_jax.model import KVCache, Params, Phi3
from phi3_jax.model.points import POINTS, Edit, Hooks, Tap

LIMIT = 4 << 30
Seen = dict[str, jax.Array]


def run(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    reads: Sequence[str] = ("logits",),
    *,
    layers: Numbers = None,
    positions: Any = None,
    heads: Numbers = None,
    edits: Sequence[Edit] = (),
    token_positions: Any = None,
    cache: KVCache | None = None,
    limit: int = LIMIT,
) -> Any:
    """Runs tokens through the model, and returns the values that were asked for.

    Args:
      params: of any kind: floats, integers, packed, with adapters attached.
      tokens: int [B, T].
      reads: names of points, patterns of them ("attn.*", "resid_*"), or names of TransformerLens ("blocks.*.hook_z").
      layers: the layers that are read; negative numbers count from the end; None reads all.
      positions: the places along T that are read, int [P] or for each row [B, P], negative ones from the end.
      heads: the query heads that are read; of keys and values those that these heads use.
      edits: the changes, in order (edits.py).
      token_positions: int32 [B, T], -1 for padding; by default 0, 1, 2, ..., or what follows in `cache`.
      cache: keys and values of earlier tokens.
      limit: bytes that what is read may take.

    Returns:
      A dict by the points' names; POINTS has the axes, before which those of layers have an L. Types are that of the
      residual stream, or float32 (norms' scales, attention's scores and weights, logits). With a cache (dict, cache).

    Raises:
      ValueError: unknown names; layers, positions or heads out of range; more bytes than `limit`.
    """
    tokens = jnp.asarray(tokens)
    hooks = _hooks(config, tokens, reads, layers, positions, heads, edits)
    keys = tokens.shape[1] if cache is None else cache.capacity
    _check_size(hooks, config, tokens.shape, keys, limit)
    seen, cache = compiled(config, params, tokens, token_positions, cache, hooks)
    return seen if cache is None else (seen, cache)


@functools.partial(jax.jit, static_argnames="config")
def compiled(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    token_positions: jax.Array | None,
    cache: KVCache | None,
    hooks: Hooks,
) -> tuple[Seen, KVCache | None]:
    """The program of `run`, for those who differentiate it or run it under `jax.vmap`."""
    model, variables = Phi3(config), {"params": params}
    if token_positions is None and "logits" in {edit.point for edit in hooks.edits}:
        start = jnp.zeros(len(tokens), jnp.int32) if cache is None else cache.lengths
        token_positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    result: Any = model.apply(variables, tokens, token_positions, cache=cache, hooks=hooks, method="hidden")
    x, cache, seen = result
    if "logits" in hooks.reads:
        # Only those that are read are computed: all logits of a prompt would be T x V.
        if hooks.positions is not None:
            x = jnp.take_along_axis(x, jnp.atleast_2d(hooks.positions)[..., None], axis=1)
            if token_positions is not None:
                token_positions = jnp.take_along_axis(token_positions, jnp.atleast_2d(hooks.positions), axis=1)
        at = Tap(dataclasses.replace(hooks, positions=None), config, token_positions, seen)
        at("logits", jnp.asarray(model.apply(variables, x, method="unembed")))
        seen = at.kept
    return seen, cache


def by_layer(
    config: Phi3Config, params: Params, tokens: Any, reads: Sequence[str], *, at_once: int = 1, **options: Any
) -> Iterator[tuple[list[int], Seen]]:
    """`run` for some layers after the others, where all of them would take too much memory -> (layers, values).

    The model runs again for each step; the program is compiled once, if `at_once` divides the number of layers.
    """
    for first in range(0, config.num_hidden_layers, at_once):
        layers = list(range(first, min(first + at_once, config.num_hidden_layers)))
        yield layers, run(config, params, tokens, reads, layers=layers, **options)


def matching(patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of points that match, in the order in which a run passes them.

    Raises:
      ValueError: a pattern that nothing matches.
    """
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        plain = re.sub(r"^blocks\.(\d+|\*)\.", "", pattern).replace("hook_", "")
        names = [name for name in POINTS if fnmatch.fnmatchcase(name, plain) or name == f"attn.{plain}"]
        if not names:
            raise ValueError(f"no point matches {pattern!r}: there are {', '.join(POINTS)}")
        found |= set(names)
    return tuple(name for name in POINTS if name in found)


def _hooks(
    config: Phi3Config,
    tokens: jax.Array,
    reads: Sequence[str],
    layers: Numbers,
    positions: Any,
    heads: Numbers,
    edits: Sequence[Edit],
) -> Hooks:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.shape}")
    L, N = config.num_hidden_layers, config.num_attention_heads
    read_layers = None if layers is None else jnp.asarray(numbers(layers, L, "layers"))
    read_heads = None if heads is None else jnp.asarray(numbers(heads, N, "heads"))
    if positions is not None and not isinstance(positions, jax.Array):
        T = tokens.shape[1]
        rows = [numbers(row, T, "positions") for row in np.atleast_2d(np.asarray(positions))]
        positions = jnp.asarray(np.stack(rows) if np.ndim(positions) == 2 else rows[0])
    return Hooks(matching(reads), read_layers, positions, read_heads, tuple(edits))


def _check_size(hooks: Hooks, config: Phi3Config, size: tuple[int, ...], keys: int, limit: int) -> None:
    sizes = {name: 4 * math.prod(hooks.shape(name, config, size, keys)) for name in hooks.reads}
    if sum(sizes.values()) > limit:
        largest = max(sizes, key=lambda name: sizes[name])
        shape = hooks.shape(largest, config, size, keys)
        raise ValueError(
            f"what is read would take {sum(sizes.values()) / 1e9:.1f} GB, {largest} {list(shape)} alone "
            f"{sizes[largest] / 1e9:.1f} GB, and the limit is {limit / 1e9:.1f} GB: choose fewer layers, positions or "
            "heads, read layer by layer (`by_layer`), or raise `limit`"
        )

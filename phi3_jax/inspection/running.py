"""A run of which values are read, and in which some are changed.

Axis letters: L layer, B batch, T query, S key, D model, V vocab, P chosen positions.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import Numbers, numbers
from phi3_jax.model import KVCache, Params, Phi3, decoder
from phi3_jax.model.points import FLOAT32, POINTS, Edit, Hooks, Tap, plain_name, require_known

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
    segments: Any = None,
    rope_lengths: Any = None,
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
      segments, rope_lengths: see `Phi3`.
      cache: keys and values of earlier tokens; scores and weights are those of its slots (`KVCache.positions`).
      limit: bytes that what is read may take.

    Returns:
      A dict by the points' names; POINTS has the axes, before which those of layers have an L. Types are that of the
      residual stream, or float32 (norms' scales, attention's scores and weights, logits). With a cache (dict, cache).

    Raises:
      ValueError: unknown names; layers, positions or heads out of range; edits that do not fit; more bytes than
        `limit`; tokens that do not fit into the cache.
    """
    tokens = jnp.asarray(tokens)
    hooks = chosen(config, tokens, reads, layers, positions, heads, edits)
    check_size(hooks, config, params, tokens.shape, tokens.shape[1] if cache is None else cache.capacity, limit)
    token_positions, segments, rope_lengths = placed(tokens, token_positions, segments, rope_lengths)
    decoder.check_arguments(tokens, segments, cache)
    if cache is not None:  # raises: compiled, it could only give NaN
        decoder.known_overflows(cache, decoder.known_positions(tokens, token_positions, cache), config.sliding_window)
    seen, cache = compiled(config, params, tokens, token_positions, cache, hooks, segments, rope_lengths)
    return seen if cache is None else (seen, cache)


@functools.partial(jax.jit, static_argnames="config")
def compiled(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    token_positions: jax.Array | None,
    cache: KVCache | None,
    hooks: Hooks,
    segments: jax.Array | None = None,
    rope_lengths: jax.Array | None = None,
) -> tuple[Seen, KVCache | None]:
    """The program of `run`, for those who differentiate it or run it under `jax.vmap`."""
    x, spots, seen, cache = hidden(
        config, params, tokens, token_positions, cache, hooks, segments=segments, rope_lengths=rope_lengths
    )
    if "logits" in hooks.reads:
        if not hooks.changes("logits"):  # Only those that are read are computed: all of a prompt would be T x V.
            x, spots = at_places(x, hooks.positions), at_places(spots, hooks.positions)
            hooks = dataclasses.replace(hooks, positions=None)
        _, seen = logits(config, params, x, spots, hooks, seen)
    return seen, cache


def hidden(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    token_positions: jax.Array | None,
    cache: KVCache | None,
    hooks: Hooks,
    remat: decoder.Remat = "none",
    **others: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Seen, KVCache | None]:
    """Everything before the logits -> (what they are made of [B, T, D], positions int32 [B, T], values, cache)."""
    spots = decoder.known_positions(tokens, token_positions, cache)
    model = Phi3(config, remat=remat)
    arguments: dict[str, Any] = {"positions": token_positions, "cache": cache, "hooks": hooks, **others}
    result: Any = model.apply({"params": params}, tokens, **arguments, method="hidden")
    x, cache, seen = result
    return x, spots, seen, cache


def logits(
    config: Phi3Config, params: Params, x: jax.Array, spots: jax.Array, hooks: Hooks, seen: Seen
) -> tuple[jax.Array, Seen]:
    """x [B, P, D], what `hidden` returns, of tokens at the positions `spots` [B, P] -> (logits [B, P, V], values)."""
    at = Tap(hooks, config, spots, seen)
    return at("logits", jnp.asarray(Phi3(config).apply({"params": params}, x, method="unembed"))), at.kept


def at_places(array: jax.Array, chosen: jax.Array | None) -> jax.Array:
    """[B, T, ...] -> [B, P, ...]: those at the places `chosen`, [P] or [B, P]; None is all."""
    if chosen is None:
        return array
    chosen = jnp.atleast_2d(chosen)
    return jnp.take_along_axis(array, chosen.reshape(*chosen.shape, *(1,) * (array.ndim - 2)), axis=1)


def by_layer(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    reads: Sequence[str],
    *,
    layers: Numbers = None,
    at_once: int = 1,
    **options: Any,
) -> Iterator[tuple[list[int], Any]]:
    """`run` for some layers after the others, where all would take too much memory -> (layers, what it returns).

    The model runs again for each step; the program is compiled once, if `at_once` divides the number of layers.
    """
    asked = numbers(layers, config.num_hidden_layers, "layers").tolist()
    for first in range(0, len(asked), at_once):
        some = asked[first : first + at_once]
        yield some, run(config, params, tokens, reads, layers=some, **options)


def matching(patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of points that match, in the order in which a run passes them.

    Raises:
      ValueError: a pattern that nothing matches, or that names a layer.
    """
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        plain = plain_name(pattern)
        names = [name for name in POINTS if fnmatch.fnmatchcase(name, plain)]
        if not names:
            require_known(plain)
            raise ValueError(f"no point matches {pattern!r}: there are {', '.join(POINTS)}")
        found |= set(names)
    return tuple(name for name in POINTS if name in found)


def chosen(
    config: Phi3Config,
    tokens: jax.Array,
    reads: Sequence[str],
    layers: Numbers,
    positions: Any,
    heads: Numbers,
    edits: Sequence[Edit],
) -> Hooks:
    """What `run` is asked for, as the decoder wants it. Raises ValueError as `run` does."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.shape}")
    if tokens.size == 0:
        raise ValueError(f"there are no tokens: their shape is {tokens.shape}")
    L, N = config.num_hidden_layers, config.num_attention_heads
    for name, asked in (("layers", layers), ("positions", positions), ("heads", heads)):
        if asked is not None and np.size(asked) == 0:
            raise ValueError(f"no {name} are named to be read: leave {name}= out to read all")
    for edit in edits:
        edit.require_model(config)
    read_layers = None if layers is None else jnp.asarray(numbers(layers, L, "layers"))
    read_heads = None if heads is None else jnp.asarray(numbers(heads, N, "heads"))
    read_places = None if positions is None else places(positions, tokens.shape)
    return Hooks(matching(reads), read_layers, read_places, read_heads, tuple(edits))


def placed(tokens: Any, token_positions: Any, segments: Any, rope_lengths: Any) -> tuple[jax.Array | None, ...]:
    """Where tokens are in their texts, as `Phi3` wants it; what is None stays so. Raises ValueError."""
    return (
        None if token_positions is None else in_rows(tokens, token_positions),
        None if segments is None else in_rows(tokens, segments, "segments"),
        None if rope_lengths is None else jnp.asarray(rope_lengths, jnp.int32),
    )


def in_rows(tokens: Any, given: Any, name: str = "token_positions") -> jax.Array:
    """int32 [B, T], of what is given for each token, or for those of one row. Raises ValueError."""
    size, own = np.shape(tokens), np.shape(given)
    if own not in (size, (1, *size[1:]), size[1:]):
        raise ValueError(f"{name} of shape {list(own)}, where tokens are {list(size)}")
    return jnp.broadcast_to(jnp.asarray(given, jnp.int32), size)


def places(chosen: Any, size: tuple[int, ...]) -> jax.Array:
    """int32 [P] or [B, P]: places in rows of `size` [B, T]; negative ones count from the end. Raises ValueError."""
    if isinstance(chosen, jax.core.Tracer):
        return chosen
    if np.ndim(chosen) > 2 or (np.ndim(chosen) == 2 and len(chosen) not in (1, size[0])):
        raise ValueError(f"positions of shape {np.shape(chosen)}: they are [P], or [B, P] for {size[0]} rows")
    rows = [numbers(row, size[1], "positions") for row in np.atleast_2d(np.asarray(chosen))]
    return jnp.asarray(np.stack(rows) if np.ndim(chosen) == 2 else rows[0])


def check_size(hooks: Hooks, config: Phi3Config, params: Params, size: tuple[int, ...], keys: int, limit: int) -> None:
    """Raises ValueError if what is read, with what one layer makes for it, takes more than `limit` bytes."""
    stream = jax.eval_shape(
        functools.partial(Phi3(config).apply, method="embed"), {"params": params}, jnp.zeros((1, 1), int)
    )
    types = {name: jnp.float32 if name in FLOAT32 else stream.dtype for name in hooks.reads}
    shapes = {name: hooks.shape(name, config, size, keys) for name in hooks.reads}
    sizes = {name: jnp.dtype(types[name]).itemsize * math.prod(shape) for name, shape in shapes.items()}
    at, whole = Tap(hooks, config, None, {}), Hooks()
    for name, is_made in (("attn.pattern", at.wants_weights), ("attn.result", at.wants("attn.result"))):
        if is_made:  # of all queries and heads, whatever is read of them
            one = f"{name} of one layer"
            shapes[one] = whole.shape(name, config, size, keys)[1:]
            sizes[one] = (4 if name in FLOAT32 else stream.dtype.itemsize) * math.prod(shapes[one])
    if sum(sizes.values()) > limit:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"what is read would take {sum(sizes.values()) / 1e9:.1f} GB, {largest} {list(shapes[largest])} alone "
            f"{sizes[largest] / 1e9:.1f} GB, and the limit is {limit / 1e9:.1f} GB: choose fewer layers, positions or "
            "heads, read layer by layer (`by_layer`), or raise `limit`"
        )

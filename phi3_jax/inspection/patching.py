"""Sweeps: one change at every layer and position (or head) of a run, in one program, and what each does to its end.

Activation patching (causal tracing, arXiv:2202.05262) puts values of another run there; where the model's answer
follows, the value decides it. Attribution patching estimates the same from one gradient.

Axis letters: L layer, B row, T token, N query heads, K key-value heads, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection import forks
from phi3_jax.inspection.edits import Numbers, as_data, moved, numbers, replace
from phi3_jax.inspection.running import compiled, in_rows, run
from phi3_jax.inspection.slopes import gradients
from phi3_jax.model import Params
from phi3_jax.model.points import OUTER, POINTS, Edit, Hooks, plain_name, require_known

Metric = Callable[[jax.Array], jax.Array]


def logit_difference(right: Any, wrong: Any) -> Metric:
    """A metric: the logit of one token minus that of another, the mean over rows (and places).

    It takes logits [B, V] as `sweep` has them, and [B, P, V] as `gradients` and `ablation` do. An id that is out of
    range gives NaN.

    Args:
      right, wrong: token ids, or int [B]. They are data: other ids need no other program.
    """
    return jax.tree_util.Partial(_logit_difference, jnp.asarray(right), jnp.asarray(wrong))


def sweep(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    edit: Edit,
    metric: Metric,
    *,
    layers: Numbers = None,
    positions: Numbers = (),
    heads: Numbers = (),
    token_positions: Any = None,
    at_once: int = 512,
) -> jax.Array:
    """Makes a change at each layer, position and head in turn, and measures the logits of the last token.

    Args:
      tokens: int [B, T]; all rows are changed together.
      edit: the change, made without `layers` (edits.py); values that have the axes L or T are taken from where the
        change is made. It is made everywhere except along what is swept.
      metric: last logits float32 [B, V] -> an array; `logit_difference`, or another function that jax can trace, each
        of which needs a program of its own.
      layers: those that are swept; None is all.
      positions: those of tokens that are swept, as the model counts them; None is all, () none. A row that has no such
        token is not changed.
      heads: those that are swept, of keys and values theirs; None is all, () none.
      token_positions: int32 [B, T], -1 for padding; by default 0, 1, 2, ...
      at_once: how many tokens are computed together, or those of one run: what it takes in memory, and how well the
        machine is used.

    Returns:
      The metric [layers, positions, heads, ...], without the axes that are not swept.

    Raises:
      ValueError: layers, positions or heads that are not there; an edit that has its own where they are swept; a point
        that has no layers, or no heads, where they are swept.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.shape}")
    token_positions = np.arange(tokens.shape[1]) if token_positions is None else token_positions
    with jax.ensure_compile_time_eval():  # what is swept is laid out before anything is traced
        token_positions = np.asarray(in_rows(tokens, token_positions))
    outer, swept = edit.point in OUTER, tuple(each is None or np.size(each) > 0 for each in (positions, heads))
    _check(edit, tokens.shape, layers, *swept)
    count = config.num_key_value_heads if "K" in POINTS[edit.point] else config.num_attention_heads
    chosen = numbers([0] if outer else layers, config.num_hidden_layers, "layers")
    axes = [numbers(positions, int(token_positions.max()) + 1, "positions"), numbers(heads, count, "heads")]
    # Every pair of a position and a head; -1 stands for what is not swept.
    grid = np.meshgrid(*(axis if is_swept else [-1] for axis, is_swept in zip(axes, swept, strict=True)), indexing="ij")
    places = [each.reshape(-1).astype(np.int32) for each in grid]
    arguments = (config, params, tokens, jnp.asarray(token_positions), edit, jnp.asarray(chosen))
    if outer or edit.function is not None or edit.positions is not None:
        given = tuple(each if is_swept else None for each, is_swept in zip(places, swept, strict=True))
        found = _whole(*arguments, given, as_data(metric), max(at_once // tokens.size, 1))
    else:
        packed, index = forks.batches(token_positions, places[0], places[1], at_once)
        found = forks.measured(*arguments, packed, as_data(metric))
        found = found.reshape(len(chosen), -1, *found.shape[3:])[:, index]
    shape = [len(axis) for axis, is_swept in zip(axes, swept, strict=True) if is_swept]
    return found.reshape(len(chosen), *shape, *found.shape[2:])


def patch_sweep(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    other: Any,
    metric: Metric,
    *,
    point: str = "resid_pre",
    positions: Numbers = None,
    **options: Any,
) -> jax.Array:
    """Activation patching: `sweep` with the values that the point has in a run of other tokens of the same shape.

    Args:
      tokens, other: int [B, T]; the values of `other` are put into the run of `tokens`.
      options: of `sweep`, which has the others, too.
    """
    values = _others(config, params, tokens, other, plain_name(point), options.get("token_positions"))
    edit = replace(config, point, values)
    return sweep(config, params, tokens, edit, metric, positions=positions, **options)


def attribution_patching(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    other: Any,
    metric: Metric,
    *,
    point: str = "resid_pre",
    token_positions: Any = None,
) -> jax.Array:
    """A first-order estimate of what `patch_sweep` would change: gradient x (other - own), summed over features.

    It takes two runs and one backward pass for all layers, positions and heads (Nanda, "Attribution Patching", 2023).
    It is right for small differences; what saturates, as norms and softmax do, it gets wrong.

    Returns:
      [L, positions], for points with heads [L, positions, heads]; the metric of `patch_sweep` less that of the run as
      it is, if metrics were straight lines.

    Raises:
      ValueError: an unknown point, one that has no layers, or whose values are not those of one token.
    """
    point = plain_name(point)
    require_known(point)
    if point in OUTER or POINTS[point][:2] != "BT":
        raise ValueError(f"{point} (axes {POINTS[point]}) has no values for each layer and token")
    token_positions = None if token_positions is None else in_rows(tokens, token_positions)
    values = _others(config, params, tokens, other, point, token_positions)
    last = [-1] if token_positions is None else np.asarray(token_positions).argmax(axis=-1)[:, None]
    of_last = jax.tree_util.Partial(_of_last, as_data(metric))
    found = gradients(config, params, tokens, of_last, [point], token_positions=token_positions, logits_at=last)
    own, slope = found.values[point], found.slopes[point]
    product = slope.astype(jnp.float32) * (values.astype(jnp.float32) - own.astype(jnp.float32))  # [L, B, T, ...]
    per_head = bool(set("NK") & set(POINTS[point]))
    product = product.sum(axis=tuple(range(3 + per_head, product.ndim)))
    if token_positions is None:
        return product.sum(axis=1)
    where = np.asarray(token_positions)
    row, column = np.nonzero(where >= 0)
    sums = jnp.zeros((len(product), where.max() + 1, *product.shape[3:]))
    return sums.at[:, where[row, column]].add(product[:, row, column])


@functools.partial(jax.jit, static_argnames=("config", "at_once"))
def _whole(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    token_positions: jax.Array,
    edit: Edit,
    layers: jax.Array,
    places: tuple[jax.Array | None, jax.Array | None],
    metric: Metric,
    at_once: int,
) -> jax.Array:
    """The metric [layers, places, ...] by whole runs, `at_once` of them together: for every kind of change."""
    last = token_positions.argmax(axis=-1)[:, None]
    is_outer = edit.point in OUTER

    def one(place: tuple[jax.Array, jax.Array | None, jax.Array | None]) -> jax.Array:
        layer, position, head = place
        here = edit if position is None else _at_position(edit, token_positions, position)
        here = moved(config, here, None if is_outer else layer, position, head)
        hooks = Hooks(("logits",), positions=last, edits=(here,))
        return metric(compiled(config, params, tokens, token_positions, None, hooks)[0]["logits"][:, 0])

    number = next((len(each) for each in places if each is not None), 1)
    grid = [jnp.repeat(layers, number), *(None if each is None else jnp.tile(each, len(layers)) for each in places)]
    found = jax.lax.map(one, tuple(grid), batch_size=at_once)
    return found.reshape(len(layers), number, *found.shape[1:])


def _at_position(edit: Edit, token_positions: jax.Array, position: jax.Array) -> Edit:
    """The edit with what its factor and value have for the token at a position, whose axis T gets size 1."""
    axis = 1 + POINTS[edit.point].index("T")
    column = (token_positions == position).argmax(axis=-1)  # [B]

    def cut(array: jax.Array) -> jax.Array:
        if array.ndim == 0 or array.shape[axis] == 1:
            return array
        array = jnp.broadcast_to(array, (len(array), len(column), *array.shape[2:]))
        where = column.reshape(1, -1, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, where, axis=axis)

    return dataclasses.replace(edit, factor=cut(edit.factor), value=cut(edit.value))


def _check(edit: Edit, size: tuple[int, ...], layers: Numbers, over_positions: bool, over_heads: bool) -> None:
    axes = POINTS[edit.point]
    for array in (edit.factor, edit.value):
        for axis, count in zip("BT", size, strict=True):
            own = array.shape[1 + axes.index(axis)] if array.ndim else 1
            if own not in (1, count) and not (axis == "T" and edit.positions is not None):
                raise ValueError(f"{edit.point}: an edit of shape {list(array.shape)} for tokens {list(size)}")
    if not isinstance(edit.layers, jax.core.Tracer) and not np.all(edit.layers):
        raise ValueError("a sweep moves the change from layer to layer: make it without layers")
    if edit.point in OUTER and layers is not None:
        raise ValueError(f"{edit.point} has no layers to sweep over")
    if over_heads and not set("NK") & set(axes):
        raise ValueError(f"{edit.point} has no heads to sweep over: its axes are {axes}")
    if over_positions and edit.positions is not None:
        raise ValueError("a sweep over positions moves the change: make it without positions")
    if over_heads and edit.heads is not None:
        raise ValueError("a sweep over heads moves the change: make it without heads")


def _others(config: Phi3Config, params: Params, tokens: Any, other: Any, point: str, token_positions: Any) -> jax.Array:
    """The point's values in the run of other tokens, [L, B, T, ...]."""
    if np.shape(tokens) != np.shape(other):
        raise ValueError(f"tokens {np.shape(tokens)} and other {np.shape(other)} must have the same shape")
    (values,) = run(config, params, other, (point,), token_positions=token_positions).values()
    return values[None] if point in OUTER else values


def _logit_difference(right: jax.Array, wrong: jax.Array, logits: jax.Array) -> jax.Array:
    def of(ids: jax.Array) -> jax.Array:
        ids = ids.reshape(-1, *[1] * (logits.ndim - 1))
        return jnp.take_along_axis(logits, jnp.broadcast_to(ids, (*logits.shape[:-1], 1)), axis=-1)

    return (of(right) - of(wrong)).mean()


def _of_last(metric: Metric, logits: jax.Array) -> jax.Array:
    """A metric of last logits [B, V], of logits [B, 1, V]."""
    return metric(logits[:, 0])

"""Changes of a run's values, as data: a point, masks that say where, and what is put there.

All of these functions take a point by its name, ours or TransformerLens', and where they change something; None means
everywhere:

    layers     numbers; negative ones count from the end
    positions  of tokens, as the model counts them from 0 on, also where a cache holds the earlier ones: int [P], or
               [B, P] for each row its own, where -1 is none
    heads      numbers of query heads; at keys and values, of key-value heads

Other numbers need no other program, as long as there are as many positions.

Axis letters: L layer, B batch, T query, N query heads, K key-value heads, P chosen positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.model.points import OUTER, POINTS, Edit, plain_name, require_known

Numbers = Sequence[int] | None


def zero(config: Phi3Config, point: str, layers: Numbers = None, positions: Any = None, heads: Numbers = None) -> Edit:
    """The values become 0."""
    return _edit(config, point, 0.0, 0.0, layers, positions, heads)


def scale(
    config: Phi3Config, point: str, factor: Any, layers: Numbers = None, positions: Any = None, heads: Numbers = None
) -> Edit:
    """The values are multiplied; `factor` is like `value` of `replace`."""
    return _edit(config, point, factor, 0.0, layers, positions, heads)


def add(
    config: Phi3Config, point: str, value: Any, layers: Numbers = None, positions: Any = None, heads: Numbers = None
) -> Edit:
    """Something is added to the values: a steering vector, for instance. `value` is like that of `replace`."""
    return _edit(config, point, 1.0, value, layers, positions, heads)


def replace(
    config: Phi3Config, point: str, value: Any, layers: Numbers = None, positions: Any = None, heads: Numbers = None
) -> Edit:
    """Other values take their place; those of another run, for instance (activation patching).

    Args:
      value: floats that broadcast, as NumPy does it, to the point's axes (POINTS) behind one for the layers, which is
        how `run` returns them: of layers and heads all, 1, or as many as are named, in that order; of T as many as
        `positions`, or 1; without `positions` as many as there are tokens, or 1.

    Raises:
      ValueError: an unknown point; a layer, position or head that cannot be; a value of another shape.
    """
    return _edit(config, point, 0.0, value, layers, positions, heads)


def change(
    config: Phi3Config,
    point: str,
    function: Callable[[jax.Array], jax.Array],
    layers: Numbers = None,
    positions: Any = None,
    heads: Numbers = None,
) -> Edit:
    """A function makes the new values of the old: float32, one layer's, with the point's axes; jax must trace it.

    It gets all positions and heads; the others keep their old values. Another function needs another program; the same
    one does not, and arrays that change can be bound to it: `jax.tree_util.Partial(function, array)`.
    """
    edit = _edit(config, point, 0.0, 0.0, layers, positions, heads)
    return dataclasses.replace(edit, function=as_data(function))


def moved(config: Phi3Config, edit: Edit, layer: Any = None, position: Any = None, head: Any = None) -> Edit:
    """The same change at another layer, position or head: int32 scalars, which `jax.vmap` may run through.

    Raises:
      ValueError: a point that has no layers, or no heads; numbers that cannot be. Of those that `jax.vmap` runs through
        only the program knows: where there is no such layer, position or head, it changes nothing.
    """
    _check_axes(edit.point, layer, head)
    if layer is not None:
        edit = dataclasses.replace(edit, layers=_one(layer, config.num_hidden_layers, "layers"))
    if position is not None:
        position = position if isinstance(position, jax.core.Tracer) else np.asarray(position)
        edit = dataclasses.replace(edit, positions=_positions(position[..., None]))
    if head is not None:
        edit = dataclasses.replace(edit, heads=_one(head, _heads(config, edit.point), "heads"))
    return edit


def as_data(function: Callable[..., jax.Array]) -> jax.tree_util.Partial:
    """A function as a pytree, which compiled programs take as data: what a `Partial` has bound are its leaves."""
    # A Partial of a Partial would make constants of them.
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def numbers(chosen: Numbers, count: int, what: str) -> np.ndarray:
    """int32: the numbers of some of `count` layers, heads or places; negative ones count from the end; None is all.

    Raises:
      ValueError: a number that is out of range, or that is there twice.
    """
    found = np.arange(count) if chosen is None else np.asarray(chosen).reshape(-1)
    if len(found) and found.dtype.kind not in "iu":
        raise ValueError(f"{what} are numbers, not {found.tolist()}")
    found = found.astype(np.int32)
    if len(found) and not (-count <= found.min() and found.max() < count):
        raise ValueError(f"{what} {found.tolist()}: there are {count}, 0 to {count - 1}")
    found = found % max(count, 1)
    if len(set(found.tolist())) < len(found):
        raise ValueError(f"{what} {found.tolist()}: each can be named once")
    return found


def _edit(
    config: Phi3Config, point: str, factor: Any, value: Any, layers: Numbers, positions: Any, heads: Numbers
) -> Edit:
    point = plain_name(point)
    require_known(point)
    _check_axes(point, layers, heads)
    chosen = {"L": None if layers is None else numbers(layers, config.num_hidden_layers, "layers")}
    chosen["N"] = chosen["K"] = None if heads is None else numbers(heads, _heads(config, point), "heads")
    positions = None if positions is None else _positions(positions)
    return Edit(
        point=point,
        layers=_mask(chosen["L"], config.num_hidden_layers),
        positions=positions,
        heads=None if heads is None else _mask(chosen["N"], _heads(config, point)),
        factor=_wide(config, point, factor, positions, chosen),
        value=_wide(config, point, value, positions, chosen),
    )


def _check_axes(point: str, layers: Any, heads: Any) -> None:
    if heads is not None and not set("NK") & set(POINTS[point]):
        raise ValueError(f"{point} has no heads: its axes are {POINTS[point]}")
    if layers is not None and point in OUTER:
        raise ValueError(f"{point} has no layers")


def _one(number: Any, count: int, what: str) -> jax.Array:
    """bool [count]: the mask of one number, which may be negative, and may be traced."""
    if not isinstance(number, jax.core.Tracer):
        number = numbers(number, count, what)
    each = jnp.arange(count)
    return (each == number) | (each == number + count)


def _mask(chosen: np.ndarray | None, count: int) -> jax.Array:
    return jnp.ones(count, bool) if chosen is None else jnp.asarray(np.isin(np.arange(count), chosen))


def _heads(config: Phi3Config, point: str) -> int:
    return config.num_attention_heads if "N" in POINTS[point] else config.num_key_value_heads


def _positions(positions: Any) -> jax.Array:
    """int32 [P] or [B, P]. Raises ValueError for what cannot be positions."""
    if isinstance(positions, jax.core.Tracer):
        return jnp.atleast_1d(positions)
    found = np.atleast_1d(np.asarray(positions))
    if found.ndim > 2 or found.dtype.kind not in "iu":
        raise ValueError(f"positions are numbers [P] or [B, P], not {found.tolist()}")
    if found.min(initial=0) < (-1 if found.ndim == 2 else 0):
        raise ValueError(
            f"positions {found.tolist()}: an edit counts them from 0 on, for the next tokens have some, too"
        )
    for row in np.atleast_2d(found):
        if len(set(row[row >= 0])) < (row >= 0).sum():
            raise ValueError(f"positions {row.tolist()}: each can be named once")
    return jnp.asarray(found, jnp.int32)


def _wide(
    config: Phi3Config, point: str, value: Any, positions: jax.Array | None, chosen: dict[str, np.ndarray | None]
) -> jax.Array:
    """The value as `Edit` wants it: all layers and heads, or one for all of them."""
    value, axes = jnp.asarray(value, jnp.float32), "L" + POINTS[point]
    if value.ndim == 0:
        return value
    if value.ndim > len(axes):
        raise ValueError(f"a value of shape {value.shape} for {point}: it has the axes {axes}")
    value = value.reshape((1,) * (len(axes) - value.ndim) + value.shape)
    known = {"L": 1 if point in OUTER else config.num_hidden_layers}
    known |= {"N": config.num_attention_heads, "K": config.num_key_value_heads}
    known |= {"H": config.head_dim, "D": config.hidden_size, "F": config.intermediate_size, "V": config.vocab_size}
    known |= {} if positions is None else {"T": positions.shape[-1]}
    for place, axis in enumerate(axes):
        size, own = value.shape[place], chosen.get(axis)
        if own is not None and size == len(own) != 1:  # the values of those that are named, in that order
            room = jnp.zeros((*value.shape[:place], known[axis], *value.shape[place + 1 :]), jnp.float32)
            value = room.at[(*(slice(None),) * place, own)].set(value)
        elif size not in (1, known.get(axis, size)):
            raise ValueError(f"a value of shape {value.shape} for {point} ({axes}): {axis} must be {known[axis]} or 1")
    return value

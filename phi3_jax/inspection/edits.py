"""Changes of a run's values, as data: a point, masks that say where, and what is put there.

All of these functions take where they change something: `layers` (numbers; negative ones count from the end),
`positions` (of tokens, from 0 on) and `heads` (of keys and values those heads); None means everywhere. Changing the
numbers, but not how many positions there are, needs no other program.

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
from phi3_jax.model.points import OUTER, POINTS, Edit

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
        how `run` returns them. Of T there may be 1, or as many as `positions`; without `positions` as many as tokens.

    Raises:
      ValueError: an unknown point; a layer or head that the model has not; a value of another shape.
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

    Another function needs another program; the same function object does not.
    """
    return dataclasses.replace(_edit(config, point, 0.0, 0.0, layers, positions, heads), function=function)


def moved(config: Phi3Config, edit: Edit, layer: Any = None, position: Any = None, head: Any = None) -> Edit:
    """The same change at another layer, position or head: int32 scalars, which `jax.vmap` may run through."""
    if layer is not None:
        edit = dataclasses.replace(edit, layers=jnp.arange(config.num_hidden_layers) == layer)
    if position is not None:
        edit = dataclasses.replace(edit, positions=jnp.asarray(position, jnp.int32)[..., None])
    if head is not None:
        edit = dataclasses.replace(edit, heads=jnp.arange(_heads(config, edit.point)) == head)
    return edit


def numbers(chosen: Numbers, count: int, what: str) -> np.ndarray:
    """int32: the numbers of some of `count` layers, heads or places; negative ones count from the end; None is all.

    Raises:
      ValueError: a number that is out of range, or that is there twice.
    """
    found = np.arange(count, dtype=np.int32) if chosen is None else np.asarray(chosen, np.int32).reshape(-1)
    if len(found) and not (-count <= found.min() and found.max() < count):
        raise ValueError(f"{what} {found.tolist()}: there are {count}, 0 to {count - 1}")
    found = found % max(count, 1)
    if len(set(found.tolist())) < len(found):
        raise ValueError(f"{what} {found.tolist()}: each can be named once")
    return found


def _edit(
    config: Phi3Config, point: str, factor: Any, value: Any, layers: Numbers, positions: Any, heads: Numbers
) -> Edit:
    if point not in POINTS:
        raise ValueError(f"there is no point {point!r}: known are {', '.join(POINTS)}")
    if heads is not None and not set("NK") & set(POINTS[point]):
        raise ValueError(f"{point} has no heads: its axes are {POINTS[point]}")
    if layers is not None and point in OUTER:
        raise ValueError(f"{point} has no layers")
    L = config.num_hidden_layers
    return Edit(
        point=point,
        layers=jnp.asarray(np.isin(np.arange(L), numbers(layers, L, "layers"))),
        positions=None if positions is None else jnp.asarray(positions, jnp.int32),
        heads=None if heads is None else jnp.asarray(_mask(heads, _heads(config, point))),
        factor=_wide(config, point, factor, positions),
        value=_wide(config, point, value, positions),
    )


def _mask(chosen: Numbers, count: int) -> np.ndarray:
    return np.isin(np.arange(count), numbers(chosen, count, "heads"))


def _heads(config: Phi3Config, point: str) -> int:
    return config.num_attention_heads if "N" in POINTS[point] else config.num_key_value_heads


def _wide(config: Phi3Config, point: str, value: Any, positions: Any) -> jax.Array:
    """The value as `Edit` wants it."""
    value, axes = jnp.asarray(value, jnp.float32), POINTS[point]
    if value.ndim == 0:
        return value
    if value.ndim > len(axes) + 1:
        raise ValueError(f"a value of shape {value.shape} for {point}: it has the axes L{axes}")
    value = value.reshape((1,) * (len(axes) + 1 - value.ndim) + value.shape)
    known = {"L": config.num_hidden_layers, "N": config.num_attention_heads, "K": config.num_key_value_heads}
    known |= {"H": config.head_dim, "D": config.hidden_size, "F": config.intermediate_size, "V": config.vocab_size}
    known |= {"T": jnp.shape(positions)[-1]} if positions is not None else {}
    for axis, size in zip("L" + axes, value.shape, strict=True):
        if size not in (1, known.get(axis, size)):
            raise ValueError(f"a value of shape {value.shape} for {point} (L{axes}): {axis} must be {known[axis]} or 1")
    return value

"""Low-rank adapters: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

An adapter is a tree of its own: {"layers": {"self_attn": {"qkv_proj": {"a": ..., "b": ...}}}}. `attach` puts it on top
of the parameters, for training or for a trial; `merge` adds it to them. checkpoint/peft/ has its files.

Axis letters: L layer, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.kernels import LoraTensor as LoraTensor
from phi3_jax.kernels.linear.xla import dense
from phi3_jax.model import Params, parameter_shapes, require_floats

Adapter = dict[str, Any]
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter.

    Attributes:
      rank: of the update, R.
      alpha: the strength of the update, which is multiplied by alpha / rank.
      targets: the matrices that are adapted, some of TARGETS.
      rslora: divide alpha by the square root of the rank instead of the rank.
      dropout: the fraction of the update's inputs that is dropped in training.
      dora: learn the norms of the weight's rows separately from their directions.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is out of range."""
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be a whole number from 1 on, not {self.rank!r}")
        for name, value, top in (("alpha", self.alpha, math.inf), ("dropout", self.dropout, 1)):
            if type(value) not in (int, float) or not 0 <= value < top:
                raise ValueError(f"an adapter's {name} must be a number from 0 to below {top}, not {value!r}")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"an adapter's targets must be some of {', '.join(TARGETS)}, not {list(self.targets)}")

    @property
    def scaling(self) -> float:
        """The factor of b @ a in the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapter_shapes(config: Phi3Config, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's leaves by path: "layers/mlp/down_proj/a" [L, R, I], ".../b" [L, O, R].

    DoRA has ".../magnitude" [L, O], too.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in parameter_shapes(config).items():
        place = path.removesuffix("/weight")
        if place.split("/")[-1] in lora.targets:
            L, outputs, inputs = shape
            shapes |= {f"{place}/a": (L, lora.rank, inputs), f"{place}/b": (L, outputs, lora.rank)}
            shapes |= {f"{place}/magnitude": (L, outputs)} if lora.dora else {}
    return shapes


def init_adapter(config: Phi3Config, lora: LoraConfig, key: jax.Array, params: Params | None = None) -> Adapter:
    """A new float32 adapter, whose update is zero: a is uniform in +- 1 / sqrt(I), as in PEFT, and b is zero.

    Args:
      params: the model's parameters; only needed for DoRA, whose magnitudes start as the norms of the weights' rows.

    Raises:
      ValueError: DoRA without `params`.
    """
    if lora.dora and params is None:
        raise ValueError("the magnitudes of DoRA begin as the norms of the weights: give params")
    leaves: dict[str, jax.Array] = {}
    for number, (path, shape) in enumerate(adapter_shapes(config, lora).items()):
        place, _, part = path.rpartition("/")
        if part == "a":
            bound = shape[-1] ** -0.5
            leaves[path] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        elif part == "b":
            leaves[path] = jnp.zeros(shape, jnp.float32)
        else:
            base = flax.traverse_util.flatten_dict(params, sep="/")[f"{place}/weight"]
            leaves[path] = _norms(base, leaves[f"{place}/a"], leaves[f"{place}/b"], lora.scaling)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def attach(params: Params, adapter: Adapter, lora: LoraConfig, dropout_key: jax.Array | None = None) -> Params:
    """The parameters with LoraTensors as adapted weights: nothing is copied, and the adapter gets gradients.

    DoRA's norms are computed here, once for all calls of the model, and get no gradient.

    Args:
      params: weights as floats, integers or packed.
      dropout_key: random key, from which each matrix and layer gets its own; None turns dropout off.
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    for number, (place, parts) in enumerate(_places(adapter)):
        base, a, b, keys, gain = leaves[f"{place}/weight"], parts["a"], parts["b"], None, None
        if dropout_key is not None and lora.dropout:
            keys = jax.random.split(jax.random.fold_in(dropout_key, number), len(a))
        if lora.dora:
            norms = _norms(*jax.lax.stop_gradient((base, a, b)), lora.scaling)
            gain = parts["magnitude"] / norms
        leaves[f"{place}/weight"] = LoraTensor(base, a, b, gain, keys, lora.scaling, lora.dropout)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def merge(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """The parameters with the adapter added, in their own dtype: V = W + scaling * b a, or with DoRA m V / ||V||.

    Raises:
      ValueError: an adapted weight is quantised or packed.
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    for place, parts in _places(adapter):
        path = f"{place}/weight"
        require_floats({path: leaves[path]})
        leaves[path] = _merged_stack(leaves[path], parts, lora.scaling)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def require_merged(params: Params) -> None:
    """Raises ValueError if an adapter is attached."""

    def is_one(leaf: Any) -> bool:
        return isinstance(leaf, LoraTensor)

    if any(map(is_one, jax.tree.leaves(params, is_leaf=is_one))):
        raise ValueError(
            "an adapter is attached to the weights: `merge` it into floats, make floats of integers with their adapter "
            "by `checkpoint.as_floats` (phi3-export does), or write it alone by `save_adapter`"
        )


@jax.jit
def merged(weight: jax.Array, parts: Mapping[str, jax.Array], scaling: float) -> jax.Array:
    """One matrix [O, I] with its part of an adapter (a, b, perhaps magnitude) added, in float32."""
    whole = _sum(weight, parts["a"], parts["b"], scaling)
    return whole * (parts["magnitude"] / _row_norms(whole))[:, None] if "magnitude" in parts else whole


@functools.partial(jax.jit, static_argnames="scaling")
def _merged_stack(weights: jax.Array, parts: Mapping[str, jax.Array], scaling: float) -> jax.Array:
    """`merged` for [L, O, I], one layer after another: a stack in float32 would not fit beside a large model."""
    return jax.lax.map(lambda each: merged(*each, scaling).astype(weights.dtype), (weights, parts))


def _places(adapter: Adapter) -> list[tuple[str, dict[str, jax.Array]]]:
    """("layers/mlp/down_proj", {"a": ..., "b": ...}) for each adapted matrix, sorted by path."""
    flat = flax.traverse_util.flatten_dict(adapter, is_leaf=lambda _, value: "a" in value)
    return sorted(("/".join(path), parts) for path, parts in flat.items())


def _norms(base: Any, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """The norms [L, O] of the rows of base + scaling * b a, one layer after another."""

    def of_layer(i: jax.Array) -> jax.Array:
        return _row_norms(_sum(dense(base, i, jnp.float32), a[i], b[i], scaling))

    return jax.lax.map(of_layer, jnp.arange(len(a)))


def _sum(weight: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    weight, a, b = (each.astype(jnp.float32) for each in (weight, a, b))
    return weight + scaling * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)


def _row_norms(weight: jax.Array) -> jax.Array:
    return jnp.linalg.norm(weight, axis=-1)

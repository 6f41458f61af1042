"""Low-rank adapters: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

An adapter is a tree of its own: {"layers": {"self_attn": {"qkv_proj": {"a": ..., "b": ...}}}}. `attach` puts it on top
of the parameters, for training or for a trial; `merge` adds it to them. checkpoint/peft/ has its files.

The embedding and the head are adapted as in PEFT: of a tied model each of the two can be adapted alone, or differently,
or (`tied`) both by one update. PEFT adapts the transpose of the embedding; here a and b fit the table [V, D] itself.

Axis letters: L layer, O outputs, I inputs, R rank, V vocab, D model.
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
from phi3_jax.json_files import is_number, is_whole, shown
from phi3_jax.kernels import LoraTensor as LoraTensor
from phi3_jax.kernels import PerLayer
from phi3_jax.kernels.linear.xla import dense
from phi3_jax.model import Params, parameter_shapes, require_floats

Adapter = dict[str, Any]
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
TABLE, HEAD = "embed_tokens", "lm_head"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter.

    Attributes:
      rank: of the update, R.
      alpha: the strength of the update, which is multiplied by alpha / rank.
      targets: the matrices that are adapted, some of TARGETS, TABLE and HEAD.
      rslora: divide alpha by the square root of the rank instead of the rank.
      dropout: the fraction of the update's inputs that is dropped in training.
      dora: learn the norms of the weight's rows separately from their directions; not of the embedding's.
      tied: a head that is tied to the embedding gets the embedding's update, too (PEFT's ensure_weight_tying).
      ranks, alphas: (target, number) of targets that have one of their own (PEFT's rank_pattern, alpha_pattern).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    tied: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is out of range, or two that contradict one another."""
        for rank in (self.rank, *(rank for _, rank in self.ranks)):
            if not is_whole(rank, 1):
                raise ValueError(f"the rank of an adapter must be a whole number from 1 on, not {shown(rank)}")
        alphas = [("alpha", alpha, math.inf) for alpha in (self.alpha, *(alpha for _, alpha in self.alphas))]
        for name, value, top in (*alphas, ("dropout", self.dropout, 1)):
            if not is_number(value) or not 0 <= value < top:
                raise ValueError(
                    f"an adapter's {name} must be a number from 0 to below {top} that float32 holds, not {shown(value)}"
                )
        known = (*TARGETS, TABLE, HEAD)
        if not self.targets or not set(self.targets) <= set(known):
            raise ValueError(f"an adapter's targets must be some of {', '.join(known)}, not {list(self.targets)}")
        for kind, pairs in (("rank", self.ranks), ("alpha", self.alphas)):
            names = [target for target, _ in pairs]
            if wrong := [name for name in names if name not in self.targets or names.count(name) > 1]:
                raise ValueError(
                    f"an adapter's {kind} of {wrong[0]}: each must be for one of its targets, and only one"
                )
        if self.dora and TABLE in self.targets:
            raise ValueError(
                f"DoRA of the embedding is not trained here: leave {TABLE} out of the targets, or take LoRA"
            )
        if self.tied and (TABLE not in self.targets or HEAD in self.targets):
            raise ValueError(f"a tied adapter is that of the embedding, for both: name {TABLE}, and not {HEAD}")

    @property
    def scaling(self) -> float:
        """The factor of b @ a in the update of targets that `ranks` and `alphas` do not name."""
        return self._scaling(self.rank, self.alpha)

    def rank_of(self, target: str) -> int:
        """The rank of one target's update."""
        return dict(self.ranks).get(target, self.rank)

    def alpha_of(self, target: str) -> float:
        """The alpha of one target's update."""
        return dict(self.alphas).get(target, self.alpha)

    def scaling_of(self, target: str) -> float:
        """The factor of b @ a in one target's update."""
        return self._scaling(self.rank_of(target), self.alpha_of(target))

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def adapter_shapes(config: Phi3Config, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's leaves by path: "layers/mlp/down_proj/a" [L, R, I], ".../b" [L, O, R].

    DoRA has ".../magnitude" [L, O], too. The embedding and the head have no L: "embed_tokens/a" [R, D], ".../b" [V, R].

    Raises:
      ValueError: `lora` is tied, and the model's head is not.
    """
    if lora.tied and not config.tie_word_embeddings:
        raise ValueError(f"a tied adapter, but this model's head is not tied to its embedding: name {HEAD} as a target")
    weights, shapes = parameter_shapes(config), dict[str, tuple[int, ...]]()
    weights.setdefault(f"{HEAD}/weight", weights[f"{TABLE}/weight"])  # a tied head can be adapted, too
    for path, shape in weights.items():
        place = path.removesuffix("/weight")
        if (target := _target(place)) in lora.targets:
            *L, outputs, inputs = shape
            rank = lora.rank_of(target)
            shapes |= {f"{place}/a": (*L, rank, inputs), f"{place}/b": (*L, outputs, rank)}
            shapes |= {f"{place}/magnitude": (*L, outputs)} if lora.dora else {}
    return shapes


def init_adapter(config: Phi3Config, lora: LoraConfig, key: jax.Array, params: Params | None = None) -> Adapter:
    """A new float32 adapter, whose update is zero: as in PEFT, b is zero, and a is uniform in +- 1 / sqrt(I).

    Of an embedding a is normal, also as in PEFT (there it is B, and A is zero), unless it is tied to the head.

    Args:
      params: the model's parameters; only needed for DoRA, whose magnitudes start as the norms of the weights' rows.

    Raises:
      ValueError: DoRA without `params`; see `adapter_shapes`.
    """
    if lora.dora and params is None:
        raise ValueError("the magnitudes of DoRA begin as the norms of the weights: give params")
    leaves: dict[str, jax.Array] = {}
    for number, (path, shape) in enumerate(adapter_shapes(config, lora).items()):
        place, _, part = path.rpartition("/")
        own_key = jax.random.fold_in(key, number)
        if part == "a" and place == TABLE and not lora.tied:
            leaves[path] = jax.random.normal(own_key, shape, jnp.float32)
        elif part == "a":
            bound = shape[-1] ** -0.5
            leaves[path] = jax.random.uniform(own_key, shape, jnp.float32, -bound, bound)
        elif part == "b":
            leaves[path] = jnp.zeros(shape, jnp.float32)
        else:
            base = _weights(params or {}, lora)[f"{place}/weight"]
            leaves[path] = _norms(base, leaves[f"{place}/a"], leaves[f"{place}/b"], lora.scaling_of(_target(place)))
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def attach(params: Params, adapter: Adapter, lora: LoraConfig, dropout_key: jax.Array | None = None) -> Params:
    """The parameters with LoraTensors as adapted weights: nothing is copied, and the adapter gets gradients.

    DoRA's norms are computed here, once for all calls of the model, and get no gradient. Where only one of a tied
    model's embedding and head is adapted, or each in its own way, the head gets a leaf of its own.

    Args:
      params: weights as floats, integers or packed.
      dropout_key: random key, from which each matrix and layer gets its own; None turns dropout off.
    """
    leaves = _weights(params, lora)
    for number, (place, parts) in enumerate(_places(adapter)):
        keys = None
        if dropout_key is not None and lora.dropout:
            keys = jax.random.fold_in(dropout_key, number)
            keys = jax.random.split(keys, len(parts["a"])) if parts["a"].ndim == 3 else keys
        leaves[f"{place}/weight"] = _attached(leaves[f"{place}/weight"], parts, keys, lora, _target(place))
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _attached(base: Any, parts: Mapping[str, Any], keys: jax.Array | None, lora: LoraConfig, target: str) -> Any:
    if isinstance(base, PerLayer):
        own = [(each, _of_layer(parts, i), None if keys is None else keys[i]) for i, each in enumerate(base)]
        return PerLayer(tuple(_attached(*each, lora, target) for each in own))
    a, b, gain, scaling = parts["a"], parts["b"], None, lora.scaling_of(target)
    if lora.dora:
        gain = parts["magnitude"] / _norms(*jax.lax.stop_gradient((base, a, b)), scaling)
    return LoraTensor(base, a, b, gain, keys, scaling, lora.dropout)


def merge(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """The parameters with the adapter added, in their own dtype: V = W + scaling * b a, or with DoRA m V / ||V||.

    Raises:
      ValueError: an adapted weight is quantised or packed; or the embedding and the head would not be tied any more.
    """
    leaves = _weights(params, lora)
    if f"{HEAD}/weight" in leaves and HEAD not in params:
        raise ValueError("the adapter unties the embedding and the head: load the checkpoint with it (load(adapter=))")
    for place, parts in _places(adapter):
        path, scaling = f"{place}/weight", lora.scaling_of(_target(place))
        weight = leaves[path]
        require_floats({path: weight[0] if isinstance(weight, PerLayer) else weight})
        if isinstance(weight, PerLayer):
            sums = (merged(each, _of_layer(parts, i), scaling) for i, each in enumerate(weight))
            leaves[path] = PerLayer(tuple(each.astype(weight.dtype) for each in sums))
        elif parts["a"].ndim == 3:
            leaves[path] = _merged_stack(weight, parts, scaling)
        else:
            leaves[path] = merged(weight, parts, scaling).astype(weight.dtype)
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


def _of_layer(parts: Mapping[str, Any], layer: int) -> dict[str, jax.Array]:
    """The part of an adapter for one layer of a matrix."""
    return {name: part[layer] for name, part in parts.items()}


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


def _target(place: str) -> str:
    """ "layers/mlp/down_proj" -> "down_proj"."""
    return place.split("/")[-1]


def _weights(params: Params, lora: LoraConfig) -> dict[str, Any]:
    """The weights by path; a tied model's head is one of them where the adapter parts it from the embedding."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    if not lora.tied and not {TABLE, HEAD}.isdisjoint(lora.targets):
        leaves.setdefault(f"{HEAD}/weight", leaves[f"{TABLE}/weight"])
    return leaves


def _norms(base: Any, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """The norms [(L,) O] of the rows of base + scaling * b a, one layer after another."""

    def of_layer(i: jax.Array) -> jax.Array:
        return _row_norms(_sum(dense(base, i, jnp.float32), a[i], b[i], scaling))

    if isinstance(base, PerLayer):
        return jnp.stack([_norms(each, a[i], b[i], scaling) for i, each in enumerate(base)])
    if a.ndim == 2:
        return _row_norms(_sum(dense(base, None, jnp.float32), a, b, scaling))
    return jax.lax.map(of_layer, jnp.arange(len(a)))


def _sum(weight: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    weight, a, b = (each.astype(jnp.float32) for each in (weight, a, b))
    return weight + scaling * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)


def _row_norms(weight: jax.Array) -> jax.Array:
    return jnp.linalg.norm(weight, axis=-1)

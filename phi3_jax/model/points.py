"""Points of the decoder at which values can be read and changed, under the names that TransformerLens' users know.

The decoder passes each value through a `Tap`: `x = at("resid_mid", x + attended)`. Where nobody reads or changes
anything, a tap hands the value on, and leaves no trace in the program. One layer, in order:

    resid_pre -> ln1.scale, ln1.normalized, ln1.out -> attn.q, .k, .v -> attn.rot_q, .rot_k -> attn.scores
    -> attn.pattern -> attn.z -> attn.result -> attn_out -> resid_mid
    -> ln2.scale, ln2.normalized, ln2.out -> mlp.pre, mlp.pre_linear -> mlp.post -> mlp_out -> resid_post

Before the layers comes `embed`, after them `ln_final.scale`, `.normalized`, `.out`, and `logits`.

Axis letters: L layer, B batch, T query, S key, N query heads, K key-value heads, G = N/K, H head dim, D model, F ffn,
V vocab, P chosen positions.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.spelling import did_you_mean

_NORM = {"scale": "BT", "normalized": "BTD", "out": "BTD"}

# The axes of each value. q, k, v are before the rotation; a norm's scale is what it divides by; `normalized` is before
# its weight, `out` after it. attn.result is what each head adds to attn_out. mlp.pre is the gate before silu,
# mlp.pre_linear what it is multiplied with, mlp.post their product. With a cache, keys S are its slots. Scores of keys
# that a query must not see are about -3e38, and stay hidden whatever an edit makes of them.
POINTS: dict[str, str] = {
    "embed": "BTD",
    "resid_pre": "BTD",
    **{f"ln1.{name}": axes for name, axes in _NORM.items()},
    "attn.q": "BTNH",
    "attn.k": "BTKH",
    "attn.v": "BTKH",
    "attn.rot_q": "BTNH",
    "attn.rot_k": "BTKH",
    "attn.scores": "BNTS",
    "attn.pattern": "BNTS",
    "attn.z": "BTNH",
    "attn.result": "BTND",
    "attn_out": "BTD",
    "resid_mid": "BTD",
    **{f"ln2.{name}": axes for name, axes in _NORM.items()},
    "mlp.pre": "BTF",
    "mlp.pre_linear": "BTF",
    "mlp.post": "BTF",
    "mlp_out": "BTD",
    "resid_post": "BTD",
    **{f"ln_final.{name}": axes for name, axes in _NORM.items()},
    "logits": "BTV",
}
OUTER = ("embed", "ln_final.scale", "ln_final.normalized", "ln_final.out", "logits")  # the points that have no layer
# The points of float32; the others are of the residual stream's type.
FLOAT32 = ("ln1.scale", "ln2.scale", "ln_final.scale", "attn.scores", "attn.pattern", "logits")
_PROJECTED = ("attn.q", "attn.k", "attn.v", "attn.rot_q", "attn.rot_k")
_WEIGHED = ("attn.scores", "attn.pattern")


def plain_name(name: str) -> str:
    """A name, or a pattern of names, as TransformerLens has it -> ours: "blocks.*.attn.hook_z", or "z", is attn.z.

    Raises:
      ValueError: a name of one layer's point.
    """
    if named := re.match(r"blocks\.(\d+)\.", name):
        raise ValueError(f"{name!r} names a layer: write blocks.*.{name[named.end() :]} and layers=[{named[1]}]")
    plain = re.sub(r"^blocks\.\*\.", "", name).replace("hook_", "").replace("attn_scores", "scores")
    return f"attn.{plain}" if f"attn.{plain}" in POINTS else plain


def require_known(name: str) -> None:
    """Raises ValueError for a name that is not in POINTS."""
    if name not in POINTS:
        raise ValueError(f"there is no point {name!r}{did_you_mean(name, POINTS) or ';'} known are {', '.join(POINTS)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of one point's values, where the masks say so: factor * old + value, or function(old) if there is one.

    All but `point` are arrays, so that another change of the same shapes needs no other program, and `jax.vmap` runs
    many of them at once. `inspection` has functions that make them.

    Attributes:
      point: of POINTS.
      layers: bool [L]; not looked at for points that have no layer.
      positions: int32 [P] or [B, P]: positions of tokens, as the model counts them; -1 is none. None means all.
      heads: bool [N], or [K] for keys and values; None means all.
      factor, value: scalars, or arrays with the point's axes behind an L (also for points without layers); each size
        may be 1, and that of T is P where positions are given.
      function: of the float32 values of one layer, with all positions and heads; jax must trace it. Another function
        needs another program, other arrays in a `Partial` do not.
    """

    point: str = dataclasses.field(metadata={"static": True})
    layers: jax.Array
    positions: jax.Array | None
    heads: jax.Array | None
    factor: jax.Array
    value: jax.Array
    function: jax.tree_util.Partial | None = None

    def apply(self, old: jax.Array, positions: jax.Array, number: Any) -> jax.Array:
        """The changed values of one layer; positions int32 [B, T] are those of its tokens.

        Raises:
          ValueError: the edit's arrays do not fit these values.
        """
        axes = POINTS[self.point]
        wide = old.astype(jnp.float32)
        if self.function is not None:
            new = self.function(wide)
            if new.shape != wide.shape:
                raise ValueError(f"{self.point}: the function makes {list(new.shape)} of {list(wide.shape)}")
        else:
            factor, value = (self._at(each, old.shape, positions, number) for each in (self.factor, self.value))
            # 0 * inf is NaN: what is replaced is forgotten.
            new = factor * jnp.where((factor == 0) & ~jnp.isfinite(wide), 0.0, wide) + value
        where = self.layers[number] | (self.point in OUTER)
        if self.positions is not None:
            where = where & _along(self._matches(positions).any(axis=-1), axes, "BT")
        if self.heads is not None:
            where = where & _along(self.heads, axes, "NK")
        return jnp.where(where, new.astype(old.dtype), old)

    def require_model(self, config: Phi3Config) -> None:
        """Raises ValueError if the masks of layers and heads are for other numbers of them."""
        heads = config.num_attention_heads if "N" in POINTS[self.point] else config.num_key_value_heads
        for mask, count, what in ((self.layers, config.num_hidden_layers, "layers"), (self.heads, heads, "heads")):
            if mask is not None and len(mask) != count:
                raise ValueError(
                    f"{self.point}: an edit for {len(mask)} {what}, where there are {count}: make it with this model's "
                    "config"
                )

    def _matches(self, positions: jax.Array) -> jax.Array:
        """bool [B, T, P]: which token is at which of the chosen positions."""
        chosen = jnp.asarray(self.positions)
        if chosen.ndim == 2 and len(chosen) not in (1, len(positions)):
            raise ValueError(f"{self.point}: positions for {len(chosen)} rows, where there are {len(positions)}")
        return (positions[..., None] == chosen[..., None, :]) & (positions >= 0)[..., None]

    def _at(self, array: jax.Array, size: tuple[int, ...], positions: jax.Array, number: Any) -> jax.Array:
        """One layer's part of a factor or value; that of its chosen positions is spread over the tokens of `size`."""
        if array.ndim == 0:
            return array.astype(jnp.float32)
        axes = POINTS[self.point]
        place = axes.index("T")
        room = list(size)
        if self.positions is not None:
            room[place] = self.positions.shape[-1]
        if any(own not in (1, wanted) for own, wanted in zip(array.shape[1:], room, strict=True)):
            raise ValueError(
                f"{self.point}: an edit of shape {list(array.shape)}, where [L, {str(room)[1:]} is changed"
            )
        own = (array[0] if array.shape[0] == 1 else array[number]).astype(jnp.float32)
        if self.positions is None or own.shape[place] == 1:
            return own
        which = _along(self._matches(positions).argmax(axis=-1), axes, "BT")  # [B, T], and 1 for other axes
        own = jnp.broadcast_to(own, (positions.shape[0], *own.shape[1:]))
        return jnp.take_along_axis(own, which, axis=place)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is read from one pass through the model, and changed in it.

    Attributes:
      reads: names of POINTS.
      layers: int32 [any]: the layers that are read, negative ones from the end; None reads all. No layer may be there
        twice.
      positions: int32 [P] or [B, P]: places along T, of this call, that are read; None reads all.
      heads: int32 [any]: the query heads that are read, of keys and values those that they use; None reads all.
      edits: in the order in which they are made. What is read has been changed.
      probes: zeros of the shapes that are read, by name, which are added to what is read: the gradient with respect to
        a probe is that with respect to the value.
    """

    reads: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    layers: jax.Array | None = None
    positions: jax.Array | None = None
    heads: jax.Array | None = None
    edits: tuple[Edit, ...] = ()
    probes: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a name that is not in POINTS."""
        for name in (*self.reads, *(edit.point for edit in self.edits), *self.probes):
            require_known(name)

    def changes(self, name: str) -> bool:
        """Whether a point is changed."""
        return name in self.probes or any(edit.point == name for edit in self.edits)

    def shape(self, name: str, config: Phi3Config, size: tuple[int, ...], keys: int) -> tuple[int, ...]:
        """The shape of what is read at one point of `size` [B, T] tokens, L in front unless it is one of OUTER."""
        sizes = {"B": size[0], "T": size[1], "S": keys, "N": config.num_attention_heads}
        sizes |= {"K": config.num_key_value_heads, "H": config.head_dim, "D": config.hidden_size}
        sizes |= {"F": config.intermediate_size, "V": config.vocab_size}
        if self.positions is not None:
            sizes["T"] = self.positions.shape[-1]
        if self.heads is not None:
            sizes["N"] = sizes["K"] = len(self.heads)
        layers = config.num_hidden_layers if self.layers is None else len(self.layers)
        return (() if name in OUTER else (layers,)) + tuple(sizes[axis] for axis in POINTS[name])

    def nothing(self, config: Phi3Config, size: tuple[int, ...], keys: int, dtype: Any) -> dict[str, jax.Array]:
        """Room for what is read in the layers; dtype is that of the residual stream.

        Raises ValueError for edits that were made for a model of other sizes, whose masks would be of no use here.
        """
        for edit in self.edits:
            edit.require_model(config)
        names = [name for name in self.reads if name not in OUTER]
        types = {name: jnp.float32 if name in FLOAT32 else dtype for name in names}
        return {name: jnp.zeros(self.shape(name, config, size, keys), types[name]) for name in names}

    def select(self, name: str, value: jax.Array, group: int) -> jax.Array:
        """The positions and heads that are read."""
        axes = POINTS[name]
        if self.positions is not None:
            where = self.positions if self.positions.ndim == 2 else self.positions[None]
            value = jnp.take_along_axis(value, _along(where, axes, "BT"), axis=axes.index("T"))
        if self.heads is not None and "N" in axes:
            value = jnp.take(value, self.heads, axis=axes.index("N"))
        if self.heads is not None and "K" in axes:
            value = jnp.take(value, self.heads // group, axis=axes.index("K"))
        return value


class Tap:
    """The points of one layer, or those before and after the layers: called with a name and a value, in passing.

    Attributes:
      kept: what has been read so far, by name.
    """

    def __init__(
        self,
        hooks: Hooks | None,
        config: Phi3Config | None,
        positions: Any,
        kept: dict[str, jax.Array],
        number: Any = 0,
    ) -> None:
        self.hooks, self.positions, self.kept, self.number = hooks, positions, kept, number
        self.group = config.num_attention_heads // config.num_key_value_heads if config else 1
        self.depth = config.num_hidden_layers if config else 0

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """The value, changed as the edits say; it is kept if somebody reads it."""
        if self.hooks is None:
            return value
        for edit in self.hooks.edits:
            if edit.point == name:
                value = edit.apply(value, self.positions, self.number)
        if name in self.hooks.probes:
            value = value + self._probe(name, value)
        if name in self.hooks.reads:
            read = self.hooks.select(name, value, self.group)
            self.kept = self.kept | {name: read if name in OUTER else self._stored(name, read)}
        return value

    def wants(self, *names: str) -> bool:
        """Whether one of these points is read or changed."""
        return self.hooks is not None and any(name in self.hooks.reads or self.changes(name) for name in names)

    def changes(self, name: str) -> bool:
        """Whether this point is changed."""
        return self.hooks is not None and self.hooks.changes(name)

    @property
    def wants_heads(self) -> bool:
        """Whether queries, keys or values are wanted one by one, which kernels keep to themselves."""
        return self.wants(*_PROJECTED, *_WEIGHED)

    @property
    def wants_weights(self) -> bool:
        """Whether the weights that attention gives to keys are wanted."""
        return self.wants(*_WEIGHED)

    def _stored(self, name: str, value: jax.Array) -> jax.Array:
        room = self.kept[name]
        return room.at[self._place()].set(value.astype(room.dtype), mode="drop")

    def _place(self) -> Any:
        """The layer's place among those that are read; a layer that nobody reads gets one behind the end."""
        assert self.hooks is not None
        if (layers := self.hooks.layers) is None:
            return self.number
        here = (layers == self.number) | (layers == self.number - self.depth)
        return jnp.where(here, jnp.arange(len(layers)), len(layers)).min()

    def _probe(self, name: str, value: jax.Array) -> jax.Array:
        """The probe's numbers where the value is read, 0 elsewhere."""
        assert self.hooks is not None
        probe = self.hooks.probes[name]
        if name not in OUTER:
            probe = probe.at[self._place()].get(mode="fill", fill_value=0)
        read = functools.partial(self.hooks.select, name, group=self.group)
        [spread] = jax.linear_transpose(read, value)(probe)
        return spread


NO_TAP = Tap(None, None, None, {})


def _along(array: jax.Array, axes: str, own: str) -> jax.Array:
    """The array with the axes `own`, in the same order, put among `axes`; the others get size 1."""
    sizes = iter(array.shape)
    return array.reshape([next(sizes) if axis in own else 1 for axis in axes])

"""Many runs that fork from a clean one: each changes one layer at one place, and computes only what that changes.

Layers before the change are those of the clean run; so are tokens before it, whose keys and values all forks read. The
tokens of many forks lie side by side, so that a weight is read once for all of them.

Axis letters: L layer, B row of the clean run, T its tokens, N query heads, K key-value heads, H head dim, D model,
V vocab; C place of change (a position, a head, or both), R fork (a place and a row), M token of any fork.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.running import compiled
from phi3_jax.kernels import has_per_layer
from phi3_jax.kernels.attention import attention
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.masks import sequence_lengths
from phi3_jax.model import Params, Phi3
from phi3_jax.model.decoder import DecoderLayer, Shared, rms_norm
from phi3_jax.model.points import POINTS, Edit, Hooks
from phi3_jax.model.rope import cos_sin, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forks:
    """Forks that are computed together, and their tokens.

    Attributes:
      fork: int32 [M]: of which fork a token is; fork c * B + b is that of place c and row b. R is none.
      row, column: int32 [M]: where the token lies in the clean run's [B, T].
      positions: int32 [C]: which token is changed, as the model counts them; -1 is all.
      heads: int32 [C]: which head is changed; -1 is all.
    """

    fork: Any
    row: Any
    column: Any
    positions: Any
    heads: Any


def batches(
    token_positions: np.ndarray, positions: np.ndarray, heads: np.ndarray, at_once: int
) -> tuple[Forks, np.ndarray]:
    """Places of change -> batches of forks of at most `at_once` tokens, or a single place.

    Args:
      token_positions: int32 [B, T], -1 for padding.
      positions, heads: int32 [places], as in `Forks`.

    Returns:
      (Forks whose arrays have an axis of batches in front, the index of each place in the flattened [batches, C]).
    """
    # Early changes have many tokens, late ones few: taken in turn, all batches have about as many forks.
    order = np.argsort(positions, kind="stable")
    order = np.stack([order, order[::-1]], axis=1).reshape(-1)[: len(order)]
    found: list[list[int]] = []
    filled = at_once
    sizes = [int(((token_positions >= 0) & (token_positions >= each)).sum()) for each in positions]
    for place in order:
        if filled + sizes[place] > at_once or not found:
            found.append([])
            filled = 0
        found[-1].append(int(place))
        filled += sizes[place]
    B, C = len(token_positions), max(map(len, found))
    M = max(sum(sizes[place] for place in batch) for batch in found)
    shape = (len(found), max(M, 1))
    fork, row, column = np.full(shape, C * B, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    chosen = np.full((2, len(found), C), -1, np.int32)
    index = np.zeros(len(positions), np.int32)
    for i, batch in enumerate(found):
        end = 0
        for c, place in enumerate(batch):
            b, t = np.nonzero((token_positions >= 0) & (token_positions >= positions[place]))
            here = slice(end, end + len(b))
            fork[i, here], row[i, here], column[i, here] = c * B + b, b, t
            chosen[:, i, c] = positions[place], heads[place]
            index[place] = i * C + c
            end += len(b)
    return Forks(fork, row, column, chosen[0], chosen[1]), index


@functools.partial(jax.jit, static_argnames="config")
def measured(
    config: Phi3Config,
    params: Params,
    tokens: jax.Array,
    token_positions: jax.Array,
    edit: Edit,
    layers: jax.Array,
    forks: Forks,
    metric: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The metric of the last logits for each layer, batch and place -> [layers, batches, C, ...].

    Args:
      tokens, token_positions: int32 [B, T] of the clean run; -1 is the position of padding.
      edit: of a point that has layers; where it is made is what this walks through. It has no positions of its own,
        and no function: the axes of a fork's values are not those of a run.
      layers: int32 [layers]
      forks: of `batches`.
      metric: logits float32 [B, V] -> an array.
    """
    clean = Hooks(("embed", "attn.rot_k", "attn.v", "resid_post"))
    seen, _ = compiled(config, params, tokens, token_positions, None, clean)
    before = jnp.concatenate([seen["embed"][None], seen["resid_post"]])  # [L + 1, B, T, D]: what enters each layer
    angles = cos_sin(config, token_positions, sequence_lengths(token_positions), before.dtype)
    last = token_positions.argmax(axis=-1)  # [B]

    def one(item: tuple[jax.Array, Forks]) -> jax.Array:
        layer, batch = item
        rows, columns, R = batch.row, batch.column, len(batch.positions) * len(tokens)
        cos, sin = (each[rows, columns][:, None] for each in angles)
        visible = Visibility(
            token_positions[rows, columns][:, None], token_positions[rows], window=config.sliding_window
        )
        changed = Hooks(edits=(_of_tokens(config, edit, layer, batch, visible.q_positions[:, 0], len(tokens)),))
        keys = _Keys(seen["attn.rot_k"], seen["attn.v"], batch, R)
        shared = Shared(cos, sin, visible, changed)
        x = _layers(config, params, layer, before[layer, rows, columns][:, None], keys, shared)
        # Forks of rows that end before the change have no tokens: theirs is the clean run's last one.
        final = jnp.tile(before[-1, jnp.arange(len(last)), last], (len(batch.positions), 1))  # [R, D]
        final = final.at[jnp.where(columns == last[rows], batch.fork, R)].set(x[:, 0], mode="drop")
        normed = rms_norm(final, params["norm"]["weight"], config.rms_norm_eps)
        logits = jnp.asarray(Phi3(config).apply({"params": params}, normed, method="unembed"))
        return jax.vmap(metric)(logits.reshape(len(batch.positions), len(tokens), -1))

    def of_layer(layer: jax.Array) -> jax.Array:
        return jax.lax.map(lambda batch: one((layer, batch)), forks)

    return jax.lax.map(of_layer, layers)


def _layers(config: Phi3Config, params: Params, first: jax.Array, x: jax.Array, keys: _Keys, shared: Shared) -> Any:
    """x [M, 1, D] after the layers from `first` on."""
    split = has_per_layer(params["layers"])
    layer: Any = DecoderLayer(config, "unroll" if split else "index")

    def step(number: Any, x: jax.Array) -> jax.Array:
        carry, _ = layer.apply({"params": params["layers"]}, (x, keys, {}), number, shared)
        return carry[0]

    if not split:
        return jax.lax.fori_loop(first, config.num_hidden_layers, step, x)
    for number in np.arange(config.num_hidden_layers, dtype=np.int32):  # buffers of their own have numbers, not indices
        x = jax.lax.cond(number >= first, functools.partial(step, number), lambda x: x, x)
    return x


def _of_tokens(config: Phi3Config, edit: Edit, layer: jax.Array, forks: Forks, positions: jax.Array, rows: int) -> Edit:
    """The edit as one of forks' tokens, which lie as [M, 1]: it changes nothing where they are not to be changed."""
    axes = POINTS[edit.point]
    place, token = jnp.minimum(forks.fork // rows, len(forks.positions) - 1), axes.index("T")
    here = (forks.positions[place] < 0) | (forks.positions[place] == positions)
    sizes = dict.fromkeys(axes, 1) | {"B": len(here)}
    here = here.reshape(list(sizes.values()))
    for kind, count in (("N", config.num_attention_heads), ("K", config.num_key_value_heads)):
        if kind in axes:
            head = forks.heads[place][:, None]
            chosen = (head < 0) | (head == jnp.arange(count))  # [M, heads]
            here = here & chosen.reshape(list((sizes | {kind: count}).values()))

    def spread(array: jax.Array, neutral: float) -> jax.Array:
        if array.ndim:
            array = array[layer if array.shape[0] > 1 else 0]
            array = jnp.moveaxis(array, token, 1)
            array = array[forks.row if len(array) > 1 else 0 * forks.row, forks.column if array.shape[1] > 1 else 0]
            array = jnp.expand_dims(array, token)
        return jnp.where(here, array, neutral)[None]

    return dataclasses.replace(
        edit,
        layers=jnp.arange(config.num_hidden_layers) == layer,
        factor=spread(edit.factor, 1.0),
        value=spread(edit.value, 0.0),
    )


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Stands in the place of a cache: keys and values are the clean run's, but for those of a fork's own tokens.

    Attributes:
      k, v: [L, B, T, K, H] of the clean run, rotated; or of one layer and all forks, [R, T, K, H], after `write`.
    """

    k: jax.Array
    v: jax.Array
    forks: Forks
    R: int

    def attend(
        self, layer: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, visible: Visibility, kernels: bool
    ) -> tuple[jax.Array, _Keys]:
        """See `KVCache.attend`; qkv is [M, 1, N + 2K, H]."""
        K = self.k.shape[3]
        q, k, v = jnp.split(qkv, [qkv.shape[2] - 2 * K, qkv.shape[2] - K], axis=2)
        q, k = (rotate(each, cos, sin) for each in (q, k))
        return attention(q, self.write(layer, visible.q_positions, k, v).keys_values(layer), visible), self

    def write(
        self,
        layer: jax.Array,
        positions: jax.Array,
        k: jax.Array,
        v: jax.Array,
        implementation: Literal["xla"] | None = None,
    ) -> _Keys:
        """See `KVCache.write`; k and v are [M, 1, K, H]."""
        rows = jnp.arange(self.R) % self.k.shape[1]
        where = (self.forks.fork, self.forks.column)
        k, v = (own[layer][rows].at[where].set(new[:, 0], mode="drop") for own, new in ((self.k, k), (self.v, v)))
        return _Keys(k, v, self.forks, self.R)

    def keys_values(self, layer: jax.Array) -> KeysValues:
        """The keys and values that each token sees, [M, K, T, H]."""
        k, v = (each[self.forks.fork].swapaxes(1, 2) for each in (self.k, self.v))
        return KeysValues(k, v)

"""The key-value cache: the attention layers' keys and values of earlier tokens.

Axis letters: L layer, B batch, T new token, S slot, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.kernels.attention import attention, cpu, cuda, why_not_cpu
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.model.rope import rotate

_INT8_MAX = 127
_TPU_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer. The token at position p of a row lies in slot p mod S of that row.

    With as many slots as tokens, that is a full cache. With fewer it is a ring buffer: new tokens overwrite the oldest.
    For a model with a sliding window the results stay exact if S >= window + T - 1, where T tokens are written at a
    time: an overwritten token is then outside of the window of all tokens that are written with the new one. Where
    tokens are lost that should be seen, `Phi3` raises a ValueError, or inside of `jax.jit` gives NaN.

    Attributes:
      k, v: [L, B, K, S, H]; one head's keys are adjacent in memory, so that a query reads them sequentially. On a TPU,
        H is rounded up to a multiple of 128, with zeros.
      positions: int32 [B, S]: the position of the token in each slot, -1 for an empty slot.
      k_scale, v_scale: float32 [L, B, K, S] where k and v are int8: one scale for each token and head; else None.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def create(
        cls,
        config: Phi3Config,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        unset: bool = False,
    ) -> KVCache:
        """An empty cache for `batch` rows of `capacity` slots each.

        Args:
          dtype: a float type or int8.
          unset: where the CPU kernels write and read the cache, leave its memory as it came: slots that are never used
            then take neither time nor memory. It must not be read by XLA, for instance for a derivative.
        """
        # A TPU keeps the last axis in rows of 128. Shorter heads would be stored transposed, and every call would copy
        # the cache into such rows and back.
        head_dim = -(-config.head_dim // _TPU_LANES) * _TPU_LANES if jax.default_backend() == "tpu" else config.head_dim
        if jax.default_backend() == "tpu":
            # The last axis but one is cut into tiles, too: with a part of one at its end, every write copies the cache.
            capacity = -(-capacity // _TPU_LANES) * _TPU_LANES
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, head_dim)
        empty = jnp.full((batch, capacity), -1, jnp.int32)
        # k and v do not share their scales' array: buffers that are donated together must be distinct.
        # jax_debug_nans looks at all that a program returns: memory that was left as it came would be a false alarm.
        unset = unset and jax.default_backend() == "cpu" and not jax.debug_nans.value
        make = cpu.reserve if unset and why_not_cpu(dtype) is None else jnp.zeros
        scales = [make(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None for _ in range(2)]
        return cls(make(shape, dtype), make(shape, dtype), empty, *scales)

    @property
    def capacity(self) -> int:
        """Number of slots of a row."""
        return self.positions.shape[-1]

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: the number of tokens of each row so far, which is also the position of its next token."""
        return self.positions.max(axis=-1) + 1

    def overflows(self, positions: jax.Array, sliding_window: int | None) -> jax.Array:
        """Which rows lose keys that their new tokens must see, if these are written at once: bool [B].

        Args:
          positions: int32 [B, T], -1 for padding.
          sliding_window: the model's; None if every token sees all before it.
        """
        first = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min(axis=-1)
        oldest_seen = 0 if sliding_window is None else jnp.maximum(0, first - sliding_window + 1)
        return positions.max(axis=-1) - self.capacity + 1 > oldest_seen

    def claim(self, positions: jax.Array) -> KVCache:
        """Marks the slots of new tokens as taken; positions is int32 [B, T], -1 for padding, which takes none."""
        rows, slots = self._slots(positions)
        return dataclasses.replace(self, positions=self.positions.at[rows, slots].set(positions, mode="drop"))

    def write(
        self,
        layer: jax.Array,
        positions: jax.Array,
        k: jax.Array,
        v: jax.Array,
        implementation: Literal["xla"] | None = None,
    ) -> KVCache:
        """Stores one layer's new keys and values, each [B, T, K, H], in the slots of their positions.

        The kernels of the platform that a program is compiled for do it, if they can be used; "xla" forbids them.
        """
        if implementation == "xla":
            return self._scatter(layer, positions, k, v)
        by_cpu = _writes_by(cpu.write) if why_not_cpu(self.k.dtype) is None else None
        by_cuda = _writes_by(cuda.write) if cuda.why_not(self.k.dtype, k.shape[-1]) is None else None
        return by_platform(KVCache._scatter, cpu=by_cpu, cuda=by_cuda)(self, layer, positions, k, v)

    def _scatter(self, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        rows, slots = self._slots(positions)
        # Heads are indexed, too. For writes of whole [K, H] blocks, XLA on a TPU would copy the cache into a layout
        # with K and H adjacent, and back, in every layer.
        where = (layer, rows[..., None], jnp.arange(k.shape[2]), slots[..., None])
        padding = [(0, 0), (0, 0), (0, 0), (0, self.k.shape[-1] - k.shape[-1])]
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
        k_scale, v_scale = self.k_scale, self.v_scale
        if k_scale is not None and v_scale is not None:
            (k, new_k_scale), (v, new_v_scale) = _quantize(k), _quantize(v)
            k_scale = k_scale.at[where].set(new_k_scale, mode="drop")
            v_scale = v_scale.at[where].set(new_v_scale, mode="drop")
        return dataclasses.replace(
            self,
            k=self.k.at[where].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[where].set(v.astype(self.v.dtype), mode="drop"),
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def attend(
        self, layer: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, visible: Visibility, kernels: bool
    ) -> tuple[jax.Array, KVCache]:
        """Rotates one layer's new queries and keys, stores keys and values, and attends to all of them.

        Args:
          qkv: [B, T, N + 2K, H]: the heads of queries, keys and values.
          cos, sin: [B, T, R] of rope.py.
          visible: with the positions of the new tokens, whose slots are claimed.
          kernels: False forbids our kernels, whose derivatives would compute twice.

        Returns:
          ([B, T, N, H], the cache).
        """
        by_cuda = _attend_by_cuda if kernels and cuda.why_not(self.k.dtype, qkv.shape[-1]) is None else None
        in_steps = functools.partial(_attend_in_steps, implementation=None if kernels else "xla")
        return by_platform(in_steps, cuda=by_cuda)(self, layer, qkv, cos, sin, visible)

    def keys_values(self, layer: jax.Array) -> KeysValues:
        """One layer's keys and values, for `attention`; nothing is copied."""
        return KeysValues(self.k, self.v, self.k_scale, self.v_scale, layer)

    def _with(self, kv: KeysValues) -> KVCache:
        return dataclasses.replace(self, k=kv.k, v=kv.v, k_scale=kv.k_scale, v_scale=kv.v_scale)

    def _slots(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.arange(positions.shape[0])[:, None]
        # The scatter drops slots past the end: padding gets such a slot, and is skipped.
        return rows, jnp.where(positions >= 0, positions % self.capacity, self.capacity)


def _writes_by(kernel: Callable[..., KeysValues]) -> Callable[..., KVCache]:
    return lambda cache, layer, *new: cache._with(kernel(cache.keys_values(layer), *new))


def _attend_by_cuda(
    cache: KVCache, layer: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, visible: Visibility
) -> tuple[jax.Array, KVCache]:
    out, kv = cuda.attend_new(qkv, cos, sin, cache.keys_values(layer), visible)
    return out, cache._with(kv)


def _attend_in_steps(
    cache: KVCache,
    layer: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    visible: Visibility,
    implementation: Literal["xla"] | None,
) -> tuple[jax.Array, KVCache]:
    K = cache.k.shape[2]
    q, k, v = jnp.split(qkv, [qkv.shape[2] - 2 * K, qkv.shape[2] - K], axis=2)  # [B, T, N | K | K, H]
    q, k = (rotate(each, cos, sin) for each in (q, k))
    cache = cache.write(layer, visible.q_positions, k, v, implementation)
    return attention(q, cache.keys_values(layer), visible, implementation), cache


def slots_needed(config: Phi3Config, tokens: int, chunk: int) -> int:
    """How many slots a row of `tokens` tokens needs when it grows by at most `chunk` at a time."""
    if config.sliding_window is None:
        return tokens
    return min(tokens, config.sliding_window + chunk - 1)


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, T, K, H] -> (int8 of the same shape, scales [B, T, K]); each head's largest magnitude becomes 127."""
    scale = jnp.abs(x.astype(jnp.float32)).max(axis=-1) / _INT8_MAX
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x.astype(jnp.float32) / safe[..., None]).astype(jnp.int8), scale

"""The decoder, top to bottom: tokens -> embeddings -> decoder layers -> norm -> logits.

Axis letters, here and everywhere: B batch, T query, S key, N query heads, K key-value heads, G = N/K query heads that
share a key-value head, H head dim, D model, F ffn, V vocab, L layer.

Weights keep Hugging Face's names and its [out, in] orientation. Those of the decoder layers are stacked over L, in one
tree that is walked in three ways: training scans over slices of the stack (gradients stay per layer); inference scans
over the layer's index and reads the stack in place (nothing is copied before a matrix product); on a GPU, where that
would copy, each layer has buffers of its own (`kernels.PerLayer`), and the loop over layers is unrolled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.kernels import PerLayer, has_packed, has_per_layer, norm
from phi3_jax.kernels.attention import attention, training, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.masks import sequence_lengths
from phi3_jax.kernels.linear import gated, linear, rows
from phi3_jax.model.cache import KVCache
from phi3_jax.model.points import NO_TAP, Hooks, Tap
from phi3_jax.model.rope import cos_sin, rotate

Walk = Literal["slice", "index", "unroll"]
Carry = tuple[jax.Array, KVCache | None, dict[str, jax.Array]]
Remat = Literal["none", "dots", "full"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """Values that all layers share in one call.

    Attributes:
      cos, sin: [B, T, R], of the tokens' rotation angles (rope.py).
      visible: which keys each query may see.
      hooks: what is read on the way, and changed (points.py).
    """

    cos: jax.Array
    sin: jax.Array
    visible: Visibility
    hooks: Hooks | None = None


def rms_norm(
    x: jax.Array,
    weight: jax.Array | PerLayer,
    eps: float,
    layer: jax.Array | None = None,
    at: Tap = NO_TAP,
    name: str = "",
    implementation: norm.Implementation | None = None,
) -> jax.Array:
    """RMSNorm (arXiv:1910.07467) of x [..., D]: normalised in float32, cast back, scaled -> in x's dtype.

    weight is [D], or a stack [L, D] that is indexed by `layer`. `name` is that of the norm among the points of `at`;
    `implementation` is that of `kernels.norm`, whose kernels keep to themselves what is before the weight.
    """
    if not at.wants(f"{name}.scale", f"{name}.normalized"):
        return at(f"{name}.out", norm.rms_norm(x, weight, eps, layer, implementation))
    rate = norm.rate(x, eps)
    if at.wants(f"{name}.scale"):
        divisor = at(f"{name}.scale", 1 / rate[..., 0])
        rate = 1 / divisor[..., None] if at.changes(f"{name}.scale") else rate  # 1 / (1 / rate) rounds
    normed = at(f"{name}.normalized", (x.astype(jnp.float32) * rate).astype(x.dtype))
    return at(f"{name}.out", (norm.of_layer(weight, layer) * normed).astype(x.dtype))


class Weight(nn.Module):
    """One weight, declared with its shape in one layer; a call returns unchanged what the tree has under its name."""

    shape: tuple[int, ...]
    initializer: Callable[..., jax.Array]

    @nn.compact
    def __call__(self) -> jax.Array:
        # `self.param` would refuse a stack, or a weight packed for a kernel: their shapes are not the declared one.
        if self.has_variable("params", "weight"):
            return self.get_variable("params", "weight")
        return self.param("weight", self.initializer, self.shape, jnp.float32)


def matrix(config: Phi3Config, out: int, in_: int) -> Weight:
    """The weight of a linear map or an embedding, [out, in]."""
    return Weight((out, in_), nn.initializers.normal(float(config.initializer_range)))


def scale(config: Phi3Config) -> Weight:
    """The weight of an RMSNorm, [D]."""
    return Weight((config.hidden_size,), nn.initializers.ones)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; new keys and values are stored in the cache, if there is one."""

    config: Phi3Config

    def setup(self) -> None:
        c = self.config
        self.qkv_proj = matrix(c, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, c.hidden_size)
        self.o_proj = matrix(c, c.hidden_size, c.num_attention_heads * c.head_dim)

    def __call__(
        self,
        x: jax.Array,
        shared: Shared,
        cache: KVCache | None,
        number: jax.Array,
        layer: jax.Array | None,
        at: Tap,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, D] -> (output [B, T, D], cache)."""
        N, K = self.config.num_attention_heads, self.config.num_key_value_heads
        # Slices serve training: gradients may be taken, for which the kernels would compute twice.
        implementation: Literal["xla"] | None = "xla" if layer is None else None
        qkv = linear(x, self.qkv_proj(), layer)
        qkv = qkv.reshape(*x.shape[:2], N + 2 * K, self.config.head_dim)
        if cache is not None and not at.wants_heads:
            z, cache = cache.attend(number, qkv, shared.cos, shared.sin, shared.visible, implementation is None)
        else:
            q, k, v = jnp.split(qkv, [N, N + K], axis=2)  # [B, T, N | K | K, H]
            q, k, v = at("attn.q", q), at("attn.k", k), at("attn.v", v)
            q, k = (rotate(each, shared.cos, shared.sin) for each in (q, k))
            q, k = at("attn.rot_q", q), at("attn.rot_k", k)
            if cache is None:
                kv = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
            else:
                cache = cache.write(number, shared.visible.q_positions, k, v, implementation)
                kv = cache.keys_values(number)
            if at.wants_weights:
                z = xla.attention(q, kv, shared.visible, at)
            elif cache is None:
                z = training.attention(q, kv, shared.visible)
            else:
                z = attention(q, kv, shared.visible, implementation)
        z = at("attn.z", z)
        if at.wants("attn.result"):
            # A head's part is the output for its z alone. Only a change is worth another sum: it rounds differently.
            alone = z[:, :, :, None] * jnp.eye(N, dtype=z.dtype)[..., None]  # [B, T, N, N, H]
            result = at("attn.result", linear(alone.reshape(*z.shape[:3], -1), self.o_proj(), layer))
            if at.changes("attn.result"):
                return at("attn_out", result.sum(axis=2)), cache
        return at("attn_out", linear(z.reshape(*x.shape[:2], -1), self.o_proj(), layer)), cache


class MLP(nn.Module):
    """The gated feed-forward block: down(up * silu(gate))."""

    config: Phi3Config

    def setup(self) -> None:
        self.gate_up_proj = matrix(self.config, 2 * self.config.intermediate_size, self.config.hidden_size)
        self.down_proj = matrix(self.config, self.config.hidden_size, self.config.intermediate_size)

    def __call__(self, x: jax.Array, layer: jax.Array | None, at: Tap) -> jax.Array:
        """x [B, T, D] -> output [B, T, D]."""
        if at.wants("mlp.pre", "mlp.pre_linear"):
            gate, up = jnp.split(linear(x, self.gate_up_proj(), layer), 2, axis=-1)
            gate, up = at("mlp.pre", gate), at("mlp.pre_linear", up)
            features = up * jax.nn.silu(gate)
        else:
            features = gated(x, self.gate_up_proj(), layer)
        return at("mlp_out", linear(at("mlp.post", features), self.down_proj(), layer))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised input and added to the residual stream."""

    config: Phi3Config
    walk: Walk

    def setup(self) -> None:
        self.input_layernorm = scale(self.config)
        self.self_attn = Attention(self.config)
        self.post_attention_layernorm = scale(self.config)
        self.mlp = MLP(self.config)

    def __call__(self, carry: Carry, number: jax.Array, shared: Shared) -> tuple[Carry, None]:
        """One step of the loop over layers: carry = (residual stream [B, T, D], cache, what is read of all layers)."""
        x, cache, kept = carry
        layer = None if self.walk == "slice" else number
        eps = self.config.rms_norm_eps
        # Slices serve training: gradients may be taken, for which the kernels would compute twice.
        implementation: Literal["xla"] | None = "xla" if layer is None else None
        at = Tap(shared.hooks, self.config, shared.visible.q_positions, kept, number)
        x = at("resid_pre", x)
        normed = rms_norm(x, self.input_layernorm(), eps, layer, at, "ln1", implementation)
        attended, cache = self.self_attn(normed, shared, cache, number, layer, at)
        x = at("resid_mid", x + attended)
        normed = rms_norm(x, self.post_attention_layernorm(), eps, layer, at, "ln2", implementation)
        x = at("resid_post", x + self.mlp(normed, layer, at))
        return (x, cache, at.kept), None


class Phi3(nn.Module):
    """A Phi-3 language model.

    `Phi3(config).apply({"params": params}, tokens)` computes logits; `init` makes random weights.

    Attributes:
      config: the sizes.
      walk: how the stack of layer weights is read: "slice" (training), "index" (inference) or "unroll", whose program
        has a copy of the layer for each; the results are the same. None takes "index" if there is a cache or weights
        are packed, else "slice", whose gradients are cheap. Weights in a buffer per layer are always unrolled.
      remat: what the backward pass recomputes instead of keeping it in memory. "none": only attention's probabilities;
        "dots": all of a layer except products with weights and attention's output; "full": all of a layer.
      in_order: a promise about calls with positions and without a cache (`Visibility.in_order`): rows are whole
        sequences, side by side from the row's first token on, with padding after them.
    """

    config: Phi3Config
    walk: Walk | None = None
    remat: Remat = "none"
    in_order: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = matrix(c, c.vocab_size, c.hidden_size)
        self.norm = scale(c)
        self.lm_head = matrix(c, c.vocab_size, c.hidden_size)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        rope_lengths: jax.Array | None = None,
        hooks: Hooks | None = None,
    ) -> Any:
        """Logits of the next token, for every token.

        Args:
          tokens: int [B, T].
          positions: int32 [B, T], -1 for padding; by default 0, 1, 2, ..., or from `cache.lengths` on.
          segments: int32 [B, T], ids in [0, T), of sequences packed into one row; positions then restart with each.
          cache: keys and values of earlier tokens, to be extended; what tokens see must fit into it (`KVCache`). Where
            it does not, the row's results are NaN if this is called inside of `jax.jit`.
          rope_lengths: int32, broadcastable to [B, T]: the sequence lengths by which LongRoPE picks its factors; by
            default every sequence's own number of tokens. Keys that are already in a cache keep the factors that they
            were written with.
          hooks: what is read of the values in between, and what is changed in them (points.py).

        Returns:
          logits float32 [B, T, V]; with a cache (logits, cache); with `hooks` one more element at the end, a dict of
          what was read, by the names of the points: those of layers have an axis L in front.

        Raises:
          ValueError: arguments that contradict one another; positions that do not fit into the cache.
        """
        x, cache_out, read = self.hidden(tokens, positions, segments, cache, rope_lengths, hooks)
        logits = self.unembed(x)
        if hooks is not None:
            at = Tap(hooks, self.config, known_positions(tokens, positions, cache), read)
            logits, read = at("logits", logits), at.kept
        result: list[Any] = [logits]
        result += [] if cache is None else [cache_out]
        result += [] if hooks is None else [read]
        return result[0] if len(result) == 1 else tuple(result)

    @nn.compact
    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        rope_lengths: jax.Array | None = None,
        hooks: Hooks | None = None,
        embedded: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """Everything before the output head -> (x [B, T, D], cache, what `hooks` reads, without the logits).

        Arguments are those of `__call__`, and `embedded` [B, T, D], which replaces the tokens' embeddings.
        """
        check_arguments(tokens, segments, cache)
        in_order = cache is None and (self.in_order or (positions is None and segments is None))
        positions = known_positions(tokens, positions, cache)
        overflows = None if cache is None else known_overflows(cache, positions, self.config.sliding_window)
        if cache is not None:
            cache = cache.claim(positions)
        k_positions = positions if cache is None else cache.positions
        if rope_lengths is None:
            rope_lengths = sequence_lengths(k_positions, segments)

        x = self.embed(tokens) if embedded is None else embedded
        if overflows is not None:  # keys were lost: NaN rather than an answer without them
            x = jnp.where(overflows[:, None, None], jnp.nan, x)
        cos, sin = cos_sin(self.config, positions, rope_lengths, x.dtype)
        visible = Visibility(positions, k_positions, segments, segments, self.config.sliding_window, in_order)
        kept = {} if hooks is None else hooks.nothing(self.config, tokens.shape, k_positions.shape[1], x.dtype)
        at = Tap(hooks, self.config, positions, kept)
        x = at("embed", x)
        (x, cache, at.kept), _ = self._layers(cache)((x, cache, at.kept), Shared(cos, sin, visible, hooks))
        if overflows is not None and hooks is not None:  # an edit may have replaced what came from NaN
            x = jnp.where(overflows[:, None, None], jnp.nan, x)
        by: Literal["xla"] | None = "xla" if self._walk(cache) == "slice" else None
        return rms_norm(x, self.norm(), self.config.rms_norm_eps, None, at, "ln_final", by), cache, at.kept

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int [B, T] -> [B, T, D]; an id outside of the vocabulary gives NaN rather than another token's row."""
        is_pad = (tokens == self.config.pad_token_id)[..., None] if self.config.pad_token_id is not None else False
        return rows(self.embed_tokens(), tokens, is_pad)

    def unembed(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits float32 [..., V]; a tied head is the embedding, unless an adapter has parted them."""
        tied = self.config.tie_word_embeddings and "lm_head" not in self.variables.get("params", {})
        head = self.embed_tokens if tied else self.lm_head
        return linear(x, head(), dtype=jnp.float32)

    def _layers(self, cache: KVCache | None) -> Callable[..., Any]:
        """A function (carry, shared) -> (carry, None): all decoder layers, one after another."""
        walk, numbers = self._walk(cache), np.arange(self.config.num_hidden_layers, dtype=np.int32)
        if walk == "unroll":
            one: Any = DecoderLayer(self.config, walk, name="layers")

            def unrolled(carry: Any, shared: Shared) -> Any:
                for number in numbers:  # NumPy's, which are known when the program is traced
                    carry, _ = one(carry, number, shared)
                return carry, None

            return unrolled
        layer = DecoderLayer
        if self.remat != "none":
            policies = jax.checkpoint_policies
            dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, training.is_kept)
            layer = nn.remat(DecoderLayer, prevent_cse=False, policy=dots if self.remat == "dots" else None)
        scan = nn.scan(
            layer,
            variable_axes={"params": 0} if walk == "slice" else {},
            variable_broadcast=False if walk == "slice" else "params",
            split_rngs={"params": walk == "slice"},
            in_axes=(0, nn.broadcast),
            length=len(numbers),
        )(self.config, walk, name="layers")
        return lambda carry, shared: scan(carry, jnp.asarray(numbers), shared)

    def _walk(self, cache: KVCache | None) -> Walk:
        """How the layers are walked. Raises ValueError where the weights do not allow it."""
        if self.is_initializing():
            return "slice"  # only slices have the shapes that are declared for one layer
        params = self.variables["params"]
        is_packed, is_split = has_packed(params), has_per_layer(params)
        walk = "unroll" if is_split else self.walk or ("slice" if cache is None and not is_packed else "index")
        if walk == "slice" and is_packed:
            raise ValueError("packed weights cannot be sliced, as training does: load them with layout='rows'")
        if walk == "unroll" and self.remat != "none":
            raise ValueError(f"remat={self.remat!r} is for training, which reads stacks: load with layout='rows'")
        return walk


def known_positions(tokens: jax.Array, positions: jax.Array | None, cache: KVCache | None) -> jax.Array:
    """int32 [B, T]: those given, or else 0, 1, 2, ..., behind what is in the cache."""
    if positions is None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(steps if cache is None else cache.lengths[:, None] + steps, tokens.shape)
    return positions.astype(jnp.int32)  # with jax_enable_x64, sums with `arange` are int64


def check_arguments(tokens: jax.Array, segments: jax.Array | None, cache: KVCache | None) -> None:
    """Raises ValueError for tokens of another shape or type, and those that contradict segments or the cache."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.dtype} {tokens.shape}")
    if cache is None:
        return
    if segments is not None:
        raise ValueError("packed segments and a cache cannot be combined: a cache row is one sequence")
    if cache.positions.shape[0] != tokens.shape[0] or tokens.shape[1] > cache.capacity:
        rows, capacity = cache.positions.shape
        raise ValueError(f"tokens {tokens.shape} do not fit a cache of {rows} rows and {capacity} slots")


def known_overflows(cache: KVCache, positions: jax.Array, sliding_window: int | None) -> jax.Array:
    """`cache.overflows`. Raises ValueError if the positions are known, because nothing is being compiled."""
    rows = cache.overflows(positions, sliding_window)
    if not isinstance(rows, jax.core.Tracer) and rows.any():
        raise ValueError(
            f"positions up to {int(positions.max())} do not fit into a cache of {cache.capacity} slots: it would lose "
            "tokens that are still seen; make the cache with more slots (`slots_needed` says how many)"
        )
    return rows

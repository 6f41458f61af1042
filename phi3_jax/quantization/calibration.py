"""Rounding a model with a text at hand: each matrix is rounded for the inputs that the text gives it (gptq.py).

The text runs through the model one layer after another, and through matrices that are already rounded: each matrix is
rounded for the inputs that it will really have, and makes up for errors of those before. No more than one layer, its
inputs for the whole text and one matrix X^T X of such inputs are held as floats at a time.

Axis letters: L layer, B rows of text, T tokens of each, D model, O outputs, I inputs, N query heads, K key-value heads,
H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from phi3_jax.checkpoint.assemble import OnProgress, Params
from phi3_jax.config import Phi3Config
from phi3_jax.kernels.attention import attention
from phi3_jax.kernels.attention.arguments import Context, Keys
from phi3_jax.kernels.linear import linear
from phi3_jax.kernels.linear.quantized import QuantizedTensor, formats
from phi3_jax.model.decoder import rms_norm
from phi3_jax.model.rope import cos_sin, rotate
from phi3_jax.quantization.gptq import gptq
from phi3_jax.quantization.rounding import quantize, require_floats

# The matrices of a layer in the order in which they are used.
_STAGES = tuple(
    f"layers/{name}/weight" for name in ("self_attn/qkv_proj", "self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj")
)
_TABLE, _HEAD = "embed_tokens/weight", "lm_head/weight"


def calibrate(
    config: Phi3Config, params: Params, tokens: jax.Array, policy: str, on_progress: OnProgress | None = None
) -> Params:
    """Rounds a model's matrices by a text.

    Tables of embeddings are rounded without it (rounding.py), also where one is the output head as well: a row that is
    read must be right by itself.

    Args:
      params: a tree of floats.
      tokens: int [B, T]: B pieces of text without padding. Some tens of thousands of tokens are enough; their number
        should exceed `intermediate_size` by far.
      policy: see `quantization.formats`.
      on_progress: called with (weights done, weights in all) after each matrix.

    Raises:
      ValueError: there is no such policy; the tree has integers already; tokens are no ids of this vocabulary; weights,
        or what the model computes from the text, are not finite; scales do not fit float16.
    """
    _check(config, tokens)
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    require_floats(leaves)
    planned = formats(policy, leaves)
    total, done = sum(leaves[path].size for path, form in planned.items() if form), 0

    def round_one(path: str, weight: jax.Array, hessian: jax.Array | None) -> jax.Array | QuantizedTensor:
        nonlocal done
        if (form := planned[path]) is None:
            return weight
        try:
            result = quantize(weight, form) if hessian is None else gptq(weight, hessian, form)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        done += weight.size
        if on_progress:
            on_progress(done, total)
        return result

    result: dict[str, Any] = dict(leaves)
    result[_TABLE] = round_one(_TABLE, leaves[_TABLE], None)
    x = _rows(result[_TABLE], tokens)
    stacks: dict[str, list[Any]] = {path: [] for path in _STAGES}
    for number in range(config.num_hidden_layers):
        layer = {path: leaf[number].astype(jnp.float32) for path, leaf in leaves.items() if path.startswith("layers/")}
        for path in _STAGES:
            rounded = round_one(path, layer[path], _hessian(config, path, layer, x))
            stacks[path].append(rounded)
            layer[path] = _floats(rounded)
        x = _after(config, layer, x)
    for path, stack in stacks.items():
        result[path] = jax.tree.map(lambda *each: jnp.stack(each), *stack)
        stack.clear()
    if _HEAD in leaves:
        normed = rms_norm(x, leaves["norm/weight"].astype(jnp.float32), config.rms_norm_eps)
        result[_HEAD] = round_one(_HEAD, leaves[_HEAD], _products(normed))
    return flax.traverse_util.unflatten_dict(result, sep="/")


def _check(config: Phi3Config, tokens: jax.Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.size == 0:
        raise ValueError(f"the tokens of a text must be integers of shape [B, T], not {tokens.dtype} {tokens.shape}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise ValueError(f"the text has ids from {tokens.min()} to {tokens.max()}; vocab_size={config.vocab_size}")


def _floats(weight: jax.Array | QuantizedTensor) -> jax.Array:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.astype(jnp.float32)


def _rows(table: jax.Array | QuantizedTensor, tokens: jax.Array) -> jax.Array:
    """The embeddings float32 [B, T, D]."""
    return table.rows(tokens) if isinstance(table, QuantizedTensor) else table[tokens].astype(jnp.float32)


@jax.jit
def _products(x: jax.Array) -> jax.Array:
    """The sum of x x^T over all tokens: [B, T, I] -> [I, I]."""
    return jnp.einsum("BTI,BTJ->IJ", x, x, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("config", "stage"))
def _hessian(config: Phi3Config, stage: str, layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The sum over the text x [B, T, D] of what one matrix of a layer is given: [I, I]."""
    size = layer[stage].shape[1]

    def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return total + _products(_given(config, layer, row[None])[stage]), None

    return jax.lax.scan(add, jnp.zeros((size, size)), x)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="x")
def _after(config: Phi3Config, layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The residual stream x [B, T, D] after a layer."""
    return jax.lax.map(lambda row: _given(config, layer, row[None])["next layer"][0], x)


def _given(config: Phi3Config, layer: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """What each matrix of a layer is given, [1, T, I], and what the next layer is: model.py's decoder layer, opened up.

    Only what is used of the result is computed, where this is compiled.
    """
    T, N, K, eps = x.shape[1], config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    qkv_proj, o_proj, gate_up_proj, down_proj = (layer[stage] for stage in _STAGES)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    cos, sin = cos_sin(config, positions, jnp.int32([[T]]), x.dtype)

    normed = rms_norm(x, layer["layers/input_layernorm/weight"], eps)
    qkv = linear(normed, qkv_proj).reshape(1, T, N + 2 * K, config.head_dim)
    q, k, v = jnp.split(qkv, [N, N + K], axis=2)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    visible = Context(positions, positions, window=config.sliding_window)
    attended = attention(q, Keys(k.swapaxes(1, 2), v.swapaxes(1, 2)), visible, "xla").reshape(1, T, -1)
    x = x + linear(attended, o_proj)
    normed_again = rms_norm(x, layer["layers/post_attention_layernorm/weight"], eps)
    gate, up = jnp.split(linear(normed_again, gate_up_proj), 2, axis=-1)
    gated = up * jax.nn.silu(gate)
    return {
        **dict(zip(_STAGES, (normed, attended, normed_again, gated), strict=True)),
        "next layer": x + linear(gated, down_proj),
    }

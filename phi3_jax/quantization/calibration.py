"""Quantisation with a calibration text: each matrix is rounded for the inputs X that it gets from the text (gptq.py).

The text runs through the model one layer after another, and through matrices that are already rounded: each matrix is
rounded for the inputs that it will have in the quantised model, and compensates for the errors of those before it. At
most one layer, its inputs for the whole text and one matrix X^T X are held as float32 at a time.

Axis letters: B rows of text, T tokens of each, D model, I inputs of a matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.attention.arguments import Visibility
from phi3_jax.model import Params, require_floats
from phi3_jax.model.decoder import DecoderLayer, Shared, rms_norm
from phi3_jax.model.points import Hooks
from phi3_jax.model.rope import cos_sin
from phi3_jax.progress import OnProgress
from phi3_jax.quantization.gptq import gptq
from phi3_jax.quantization.policy import formats
from phi3_jax.quantization.rounding import quantize

# The matrices of a layer in the order in which they are used.
_MATRICES = tuple(
    f"layers/{name}/weight" for name in ("self_attn/qkv_proj", "self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj")
)
# At which points of the decoder they are fed.
_INPUTS = {"qkv_proj": "ln1.out", "o_proj": "attn.z", "gate_up_proj": "ln2.out", "down_proj": "mlp.post"}
_TABLE, _HEAD = "embed_tokens/weight", "lm_head/weight"


def calibrate(
    config: Phi3Config, params: Params, tokens: jax.Array, policy: str, on_progress: OnProgress | None = None
) -> Params:
    """Rounds a model's matrices with a calibration text.

    The embedding is rounded without it (rounding.py), also where it is the output head as well: each of its rows is
    used by itself.

    Args:
      params: a tree of floats.
      tokens: int [B, T]: B pieces of text without padding. Some tens of thousands of tokens are enough; their number
        should exceed `intermediate_size` by far.
      policy: see `policy.formats`.
      on_progress: called with (weights done, weights in all) after each matrix.

    Raises:
      ValueError: there is no such policy; weights are quantised already; tokens are outside of the vocabulary; weights
        or activations are not finite; activations are too alike; scales do not fit float16.
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
    stacks: dict[str, list[Any]] = {path: [] for path in _MATRICES}
    for number in range(config.num_hidden_layers):
        layer = {path: leaf[number].astype(jnp.float32) for path, leaf in leaves.items() if path.startswith("layers/")}
        for path in _MATRICES:
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


@functools.partial(jax.jit, static_argnames=("config", "path"))
def _hessian(config: Phi3Config, path: str, layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The sum of y y^T [I, I] over all inputs y of one matrix, in a layer whose input is x [B, T, D]."""
    size, name = layer[path].shape[1], path.split("/")[-2]

    def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return total + _products(_run_layer(config, layer, row[None])[1][name]), None

    return jax.lax.scan(add, jnp.zeros((size, size)), x)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="x")
def _after(config: Phi3Config, layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The residual stream x [B, T, D] after a layer."""
    return jax.lax.map(lambda row: _run_layer(config, layer, row[None])[0][0], x)


def _run_layer(config: Phi3Config, layer: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs one row of text x [1, T, D] through a layer -> (the layer's output, each matrix's input [1, T, I] by name).

    Under jit, XLA removes the computation of results that the caller does not use.
    """
    T = x.shape[1]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    visible = Visibility(positions, positions, window=config.sliding_window)
    hooks = Hooks(tuple(_INPUTS.values()), layers=jnp.zeros(1, jnp.int32))
    shared = Shared(*cos_sin(config, positions, jnp.int32([[T]]), x.dtype), visible, hooks)
    leaves = {path.removeprefix("layers/"): leaf for path, leaf in layer.items()}
    variables = {"params": flax.traverse_util.unflatten_dict(leaves, sep="/")}
    decoder_layer, nothing = DecoderLayer(config, "slice"), hooks.nothing(config, (1, T), T, x.dtype)
    result: Any = decoder_layer.apply(variables, (x, None, nothing), jnp.int32(0), shared)
    (after, _, read), _ = result
    return after, {name: read[point][0].reshape(1, T, -1) for name, point in _INPUTS.items()}

"""Random weights of Phi-3-mini's sizes, made on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import phi3_jax
from phi3_jax.checkpoint import placement
from phi3_jax.kernels import QuantizedTensor, split_layers
from phi3_jax.train.run.memory.ahead import params_like

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
FORMS = ("bfloat16", "int8", "int4")
_DEVIATION = {"bfloat16": 1.0, "int8": 74.0, "int4": 4.6}  # of random integers


def config(rehearse: bool) -> phi3_jax.Phi3Config:
    whole = phi3_jax.PRESETS["phi-3-mini-4k"]
    return dataclasses.replace(whole, **TINY) if rehearse else whole


def checkpoint(config: phi3_jax.Phi3Config, form: str, dtype: str = "bfloat16") -> phi3_jax.Checkpoint:
    """A model of random weights in one of FORMS, in the layout that `load` takes for this device."""
    params, layout = stacked(config, form, dtype), placement.fastest_layout()
    if layout == "layers":
        params = split_layers(params)
    if layout == "columns":
        params = jax.tree_util.tree_map_with_path(_by_columns, params, is_leaf=_is_quantized)
    # No token ends an answer, so that all are written.
    return phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings(()))


def stacked(config: phi3_jax.Phi3Config, form: str, dtype: str = "bfloat16") -> Any:
    """The weights in the layout that training takes: stacked over layers."""
    shapes = params_like(config, dtype, "" if form == "bfloat16" else form)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten(
        [
            _random(key, jax.tree_util.keystr(path), leaf.shape, leaf.dtype, _DEVIATION[form])
            for key, (path, leaf) in zip(keys, leaves, strict=True)
        ]
    )
    compute = placement.compute_dtype(dtype)

    def computing(leaf: Any) -> Any:
        return dataclasses.replace(leaf, compute=compute) if _is_quantized(leaf) else leaf

    return jax.tree.map(computing, params, is_leaf=_is_quantized)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _by_columns(path: Any, leaf: Any) -> Any:
    is_table = jax.tree_util.keystr(path, simple=True, separator="/") == placement.TABLE
    return leaf.by_columns() if _is_quantized(leaf) and not is_table else leaf


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random(key: jax.Array, path: str, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    if "norm" in path:
        return jnp.ones(shape, dtype)
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8) | 1  # 0 is no 8-bit value
    if dtype == jnp.float16:  # scales
        return jnp.full(shape, 0.02 / deviation, dtype)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(dtype)

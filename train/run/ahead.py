"""A step compiled ahead, from shapes alone: no weight is made, and no memory taken."""

from __future__ import annotations

import typing
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.model import Params, parameter_shapes
from phi3_jax.quantization import quantized_shapes

from .. import sharding
from ..data import Batch, Pair
from ..settings import Settings
from ..step import make_train_step, start


def params_like(config: Phi3Config, dtype: str, quantize: str = "") -> Params:
    """The parameters that a load gives, as shapes."""
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in parameter_shapes(config).items()}
    return flax.traverse_util.unflatten_dict(quantized_shapes(quantize, leaves) if quantize else leaves, sep="/")


def start_like(settings: Settings, config: Phi3Config, params: Params) -> tuple[Any, Any]:
    """What `start` will return, (state, frozen), as shapes with shardings; of `params` only the shapes matter."""
    shapes = jax.eval_shape(lambda params: start(settings, config, params), params)
    places = sharding.of_state(sharding.make_mesh(), shapes, settings.shard_weights)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def batch_like(settings: Settings) -> Batch | Pair:
    """A batch [A, B, T] of all processes, as shapes."""
    shape = (settings.accumulation, settings.batch_size, settings.sequence_length)
    whole, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(whole, weights, whole, whole)
    return Pair(batch, batch) if settings.method == "dpo" else batch


def compile_step(settings: Settings, config: Phi3Config, params: Params) -> tuple[jax.stages.Compiled, tuple[Any, Any]]:
    """The compiled step of `make_train_step`, and `start_like`. Errors are those of these two."""
    like = start_like(settings, config, params)
    step = typing.cast(jax.stages.Wrapped, make_train_step(settings, config))
    return step.lower(*like, batch_like(settings)).compile(), like

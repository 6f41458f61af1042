"""A step compiled ahead, from shapes alone: no weight is made, and none of its memory taken."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.model import Params, parameter_shapes
from phi3_jax.quantization import quantized_shapes

from ... import sharding
from ...data import Batch, Pair
from ...settings import Resolved
from ...step import make_train_step, start
from .estimates import Estimate, estimate


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step for settings that were tried.

    Attributes:
      settings: these.
      like: (state, frozen) as shapes with shardings.
      step: the compiled step of `make_train_step`; None if the compiler found no room for it.
      memory: what it takes; None if the compiler did not tell.
    """

    settings: Resolved
    like: tuple[Any, Any]
    step: jax.stages.Compiled | None
    memory: Estimate | None

    @property
    def fits(self) -> bool:
        """Whether there is enough memory, as far as is known."""
        return self.memory is not None and self.memory.fits


def params_like(config: Phi3Config, dtype: str, quantize: str = "") -> Params:
    """The parameters that a load gives, as shapes."""
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in parameter_shapes(config).items()}
    return flax.traverse_util.unflatten_dict(quantized_shapes(quantize, leaves) if quantize else leaves, sep="/")


def start_like(
    settings: Resolved, config: Phi3Config, params: Params, adapter: Any = None, reference: Any = None
) -> tuple[Any, Any]:
    """What `start` will return, (state, frozen), as shapes with shardings; of `params` only the shapes matter."""
    shapes = jax.eval_shape(lambda params: start(settings, config, params, adapter, reference), params)
    places = sharding.of_state(sharding.make_mesh(), shapes, settings.shard_weights)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def batch_like(settings: Resolved) -> Batch | Pair:
    """What `batches` gives, [A, B, T] of this process, as shapes."""
    shape = (settings.accumulation, settings.batch_size // jax.process_count(), settings.sequence_length)
    whole, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(whole, weights, whole, whole)
    return Pair(batch, batch) if settings.method == "dpo" else batch


def compile_step(
    settings: Resolved, config: Phi3Config, params: Params, adapters: tuple[Any, Any] = (None, None)
) -> Compiled:
    """Compiles the step of these settings for parameters of these shapes. Raises what `start` and its maker raise.

    Args:
      adapters: what `start` is given as (adapter, reference).
    """
    like = start_like(settings, config, params, *adapters)
    jitted = typing.cast(jax.stages.Wrapped, make_train_step(settings, config))
    try:
        step = jitted.lower(*like, batch_like(settings)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(settings, like, None, None)  # a TPU's compiler refuses what has no room
    return Compiled(settings, like, step, estimate(step, *like))

"""One step of training, as a pure compiled function: state and batch in, state and metrics out.

Axis letters: A batches of a step (accumulation), B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phi3_jax.adapters import Adapter, LoraConfig, init_adapter
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import QuantizedTensor, has_per_layer
from phi3_jax.model import Params

from . import sharding
from .data import Batch, Pair
from .forward import Reference, batch_sums
from .optimizer import make_optimizer, schedule
from .rounding import apply_updates
from .settings import Settings, adapter_config, resolved

_ROUNDING = 2**32 - 1  # folded into a step's key where no batch's number can be

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, the steps taken, skipped ones included.
      trainable: the parameters in `Settings.dtype`, or an adapter in float32.
      opt_state: the optimizer's state, in float32 or what its update rule uses.
      bad_steps: int32, steps that were skipped because the loss or the gradient was not finite.
      bad_in_row: int32, how many of the latest steps, in a row, were skipped.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any
    bad_steps: jax.Array
    bad_in_row: jax.Array


def start(
    settings: Settings,
    config: Phi3Config,
    params: Params,
    adapter: Adapter | None = None,
    reference: tuple[LoraConfig, Adapter] | None = None,
) -> tuple[TrainState, Params | Reference]:
    """The state before the first step, and what stays frozen, each on its devices.

    Args:
      params: the weights to begin with; an adapter can be on integers, too.
      adapter: what an adapter begins with, as `adapter_config(settings)` says; None is a new one.
      reference: the adapter that `dpo_reference` names, if it names one.

    Returns:
      (state, frozen): frozen is the base of an adapter; where all weights are trained it is empty, except for
      preferences, which are compared with the weights at the start; and a Reference where these are compared with an
      adapter that changes something. The state has arrays of its own.

    Raises:
      ValueError: train="all", but the weights are quantised; or each layer has buffers of its own.
    """
    optimizer, dtype, mesh = make_optimizer(settings), resolved(settings).dtype, sharding.make_mesh()
    if has_per_layer(params):
        raise ValueError("training reads stacks of layers, and these are apart: load the checkpoint with layout='rows'")
    if settings.train == "all" and any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
        raise ValueError("train=all: the checkpoint's weights are integers: load it as floats, or train=lora")
    base = jax.tree.map(lambda w: w if _is_quantized(w) else w.astype(dtype), params, is_leaf=_is_quantized)

    def state(base: Params, adapter: Adapter | None) -> TrainState:
        if settings.train == "all" or adapter is not None:  # a copy, or the caller's arrays would be donated
            trainable = jax.tree.map(jnp.copy, base if settings.train == "all" else adapter)
        else:
            trainable = init_adapter(config, adapter_config(settings), jax.random.key(settings.seed), base)
        opt_state = optimizer.init(_float32(trainable))
        return TrainState(jnp.int32(0), trainable, opt_state, jnp.int32(0), jnp.int32(0))

    places = sharding.of_state(mesh, jax.eval_shape(state, base, adapter), settings.shard_weights)
    frozen: Params | Reference = base if settings.train == "lora" or settings.method == "dpo" else {}
    if settings.method == "dpo" and settings.dpo_reference == "start" and adapter is not None:
        reference = adapter_config(settings), adapter
    if reference is not None:
        frozen = Reference(base, reference[1], reference[0])
    frozen = jax.device_put(frozen, sharding.of_state(mesh, frozen, settings.shard_weights))
    return jax.jit(state, out_shardings=places)(base, adapter), frozen


def make_train_step(
    settings: Settings, config: Phi3Config
) -> Callable[[TrainState, Params | Reference, Batch | Pair], tuple[TrainState, Metrics]]:
    """A function (state, frozen, batch [A, B, T]) -> (state, metrics); the given state is donated.

    The gradient is that of the loss summed over all A batches, divided once by the sum of their weights. A step whose
    loss or gradient is not finite changes only the counters. Random numbers depend on (seed, step, index in A) alone,
    those that round bfloat16 weights (rounding.py) on (seed, step, leaf).

    Metrics are float32 scalars: "loss", what is minimised, per learned token or pair; "accuracy" of tokens or of
    preferences; "tokens", the sum of weights; "grad_norm" before clipping; "lr"; "finite", 1 or 0; and of preferences
    "margin", the rewards' mean difference.

    Raises:
      ValueError: `batch_size` cannot be shared out evenly among the devices.
    """
    known = resolved(settings)
    optimizer, rate, mesh = make_optimizer(settings), schedule(settings), sharding.make_mesh()

    def placed(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, sharding.of_state(mesh, tree, settings.shard_weights))

    def gradient_and_sums(state: TrainState, frozen: Params | Reference, batch: Batch | Pair) -> tuple[Params, Metrics]:
        key = _key(settings, state)

        def loss(trainable: Params, part: Batch | Pair, number: jax.Array) -> tuple[jax.Array, Metrics]:
            sums = batch_sums(settings, config, trainable, frozen, part, jax.random.fold_in(key, number))
            return sums["loss"], sums

        def add(so_far: Any, part: tuple[Batch | Pair, jax.Array]) -> tuple[Any, None]:
            gradient, sums = jax.grad(loss, has_aux=True)(state.trainable, *part)
            return jax.tree.map(jnp.add, so_far, (_float32(gradient), sums)), None

        parts = (batch, jnp.arange(known.accumulation))
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        if known.accumulation == 1:  # without zeros to add to, which take memory and time
            gradient, sums = jax.grad(loss, has_aux=True)(state.trainable, *first)
            return _float32(gradient), sums
        shapes = jax.eval_shape(lambda: jax.grad(loss, has_aux=True)(state.trainable, *first))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        return jax.lax.scan(add, (placed(zeros[0]), zeros[1]), parts)[0]

    def step(state: TrainState, frozen: Params | Reference, batch: Batch | Pair) -> tuple[TrainState, Metrics]:
        gradient, sums = gradient_and_sums(state, frozen, batch)
        per_weight = jnp.where(sums["weight"] > 0, 1 / sums["weight"], 0)
        norm = optax.tree.norm(gradient) * per_weight
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        # As torch's clip_grad_norm_.
        clip = jnp.minimum(1, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1
        gradient = jax.tree.map(lambda leaf: leaf * (per_weight * clip), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, _float32(state.trainable))
        trainable = apply_updates(state.trainable, updates, jax.random.fold_in(_key(settings, state), _ROUNDING))
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        bad = 1 - finite.astype(jnp.int32)
        done = TrainState(
            state.step + 1, trainable, opt_state, state.bad_steps + bad, jnp.where(finite, 0, state.bad_in_row + 1)
        )
        means = {name: sums[name] * per_weight for name in sums.keys() - {"weight", "tokens", "correct"}}
        metrics = means | {
            "accuracy": sums["correct"] * per_weight,
            "tokens": sums["tokens"],
            "grad_norm": norm,
            "lr": rate(state.step - state.bad_steps),
            "finite": finite.astype(jnp.float32),
        }
        return placed(done), metrics

    rows = sharding.of_rows(mesh, known.batch_size, axes_before=1)
    return jax.jit(step, in_shardings=(None, None, rows), donate_argnums=0)


def make_eval_step(
    settings: Settings, config: Phi3Config
) -> Callable[[Params, Params | Reference, Batch | Pair], Metrics]:
    """A function (trainable, frozen, batch [B, T]) -> the plain sums of `forward.batch_sums` (its key is None).

    Raises:
      ValueError: `batch_size` cannot be shared out evenly among the devices.
    """

    def evaluate(trainable: Params, frozen: Params | Reference, batch: Batch | Pair) -> Metrics:
        return batch_sums(settings, config, trainable, frozen, batch)

    rows = sharding.of_rows(sharding.make_mesh(), resolved(settings).batch_size)
    return jax.jit(evaluate, in_shardings=(None, None, rows))


def _key(settings: Settings, state: TrainState) -> jax.Array:
    """Of the random numbers of a step; those of its batches begin with their number folded in."""
    return jax.random.fold_in(jax.random.key(settings.seed), state.step)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

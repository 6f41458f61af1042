"""Gradients become updates: the rules of `Settings.optimizer`, the learning rate over time, and what decays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .adam8bit import scale_by_adam8bit
from .settings import Settings


def schedule(settings: Settings) -> optax.Schedule:
    """The learning rate by the number of updates done.

    It rises in a line over `warmup_steps`, and then falls as in transformers' get_cosine_schedule_with_warmup or its
    linear sister, but to `final_lr` times the highest instead of 0; or it stays. The first update is at
    1 / (warmup_steps + 1) of the highest and not, as there, at 0: it would be for nothing.
    """
    s = settings

    def at(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = (count + 1) / (s.warmup_steps + 1)
        progress = jnp.clip((count - s.warmup_steps) / max(1, s.steps - s.warmup_steps), 0, 1)
        remaining = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": jnp.ones_like(progress),
        }[s.schedule]
        falling = s.final_lr + (1 - s.final_lr) * remaining
        return s.lr * jnp.where(count < s.warmup_steps, rising, falling)

    return at


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """The update rule; gradients and parameters that it is given are float32.

    - adamw: arXiv:1711.05101, with torch's conventions: m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + epsilon).
    - adamw8bit: the same with moments of one byte (adam8bit.py).
    - adafactor: arXiv:1804.04235 as transformers' Trainer sets it: no momentum, no relative steps, updates clipped to a
      root mean square of 1. Both the factors and the clipping are of a stack of layers at a time.
    - lion: arXiv:2302.06675.
    - sgd: momentum beta1.

    Weight decay is decoupled from the gradient (arXiv:1711.05101) in all of them.
    """
    s = settings
    rules = {
        "adamw": lambda: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon),
        "adamw8bit": lambda: scale_by_adam8bit(s.beta1, s.beta2, s.epsilon),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "lion": lambda: optax.scale_by_lion(s.beta1, s.beta2),
        "sgd": lambda: optax.trace(s.beta1) if s.beta1 else optax.identity(),
    }
    decay = [optax.add_decayed_weights(s.weight_decay, mask=decayed)] if s.weight_decay else []
    return optax.chain(rules[s.optimizer](), *decay, optax.scale_by_learning_rate(schedule(s)))


def decayed(params: Any) -> Any:
    """Which leaves of a parameter tree or an adapter weight decay is for: all but the weights of norms.

    These are those of transformers' Trainer, also for an adapter from PEFT: its matrices and DoRA's magnitudes decay.
    """
    return jax.tree.map_with_path(lambda path, _: not any("norm" in key.key for key in path), params)

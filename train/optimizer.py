"""The update rules of `Settings.optimizer`, the learning rate schedules, and which weights decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .adam8bit import scale_by_adam8bit
from .settings import Settings


def schedule(settings: Settings) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    It rises linearly over `warmup_steps`, and then falls as in transformers' get_cosine_schedule_with_warmup or
    get_linear_schedule_with_warmup, but to `final_lr` * lr instead of 0; or it stays at lr. The first update has
    lr / (warmup_steps + 1); in transformers it has 0 and no effect.
    """
    s, steps = settings, settings.all_steps()

    def at(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = (count + 1) / (s.warmup_steps + 1)
        progress = jnp.clip((count - s.warmup_steps) / max(1, steps - s.warmup_steps), 0, 1)
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
      root mean square of 1. The factors and the clipping are computed over a whole stack of layers.
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
    """Which leaves of a parameter tree or an adapter have weight decay: all but the weights of norms.

    As in transformers' Trainer, also for an adapter from PEFT: its matrices and DoRA's magnitudes decay.
    """
    return jax.tree.map_with_path(lambda path, _: not any("norm" in key.key for key in path), params)

"""What the model would say if it stopped after each layer: the logit lens (nostalgebraist, 2020).

The final norm and the head are put on the residual stream as it is after a layer's attention (`resid_mid`) and after
its MLP (`resid_post`). After the last layer this is the model's own answer.

Axis letters: L layer, B batch, T query (those that are read), D model, V vocab, k guesses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import numbers
from phi3_jax.inspection.running import matching, run
from phi3_jax.inspection.tuned import TunedLens, unit
from phi3_jax.model import Params, Phi3
from phi3_jax.model.decoder import rms_norm

ROWS = 128  # tokens whose logits exist at a time


class Guesses(NamedTuple):
    """What each layer would say.

    Attributes:
      ids: int32 [L, B, T, k], the most probable next tokens, the first first.
      probabilities: float32 [L, B, T, k].
      target_probability: float32 [L, B, T], or None without a target.
      target_rank: int32 [L, B, T], how many tokens are more probable than the target; None without one.
    """

    ids: jax.Array
    probabilities: jax.Array
    target_probability: jax.Array | None
    target_rank: jax.Array | None


def logit_lens(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    points: Sequence[str] = ("resid_mid", "resid_post"),
    *,
    top: int = 5,
    target: Any = None,
    tuned: TunedLens | None = None,
    **options: Any,
) -> dict[str, Guesses]:
    """The next tokens that each layer would say, by the name of the point. Logits of a few tokens exist at a time.

    Args:
      tokens: int [B, T].
      points: of the residual stream: resid_pre, resid_mid, resid_post, or a pattern of them.
      top: how many guesses, k.
      target: int, broadcastable to [B, T]: tokens whose probability and rank are wanted, too.
      tuned: maps from each layer's stream to the last one's (`fit_tuned_lens`), with which early layers can be read;
        then the only point is resid_post.
      options: of `run`: layers, positions, edits, token_positions, cache, limit. Edits of the final norm and of the
        logits have no effect here.

    Raises:
      ValueError: a point that is not of the residual stream, or not resid_post with `tuned`; `top` is not 1 to V; what
        `run` raises.
    """
    points = matching(points)
    if wrong := [name for name in points if name not in ("resid_pre", "resid_mid", "resid_post")]:
        raise ValueError(f"the lens looks at resid_pre, resid_mid and resid_post, not at {', '.join(wrong)}")
    if tuned is not None and points != ("resid_post",):
        raise ValueError(f"a tuned lens is fitted to resid_post, not to {', '.join(points)}: name that point alone")
    if not 1 <= top <= config.vocab_size:
        raise ValueError(f"top={top}: there are 1 to {config.vocab_size} next tokens")
    seen = run(config, params, tokens, points, **options)
    seen = seen[0] if isinstance(seen, tuple) else seen
    if target is not None:
        target = jnp.asarray(target, jnp.int32)
    if tuned is not None:
        layers = jnp.asarray(numbers(options.get("layers"), config.num_hidden_layers, "layers"))
        tuned = TunedLens(tuned.weight[layers], tuned.bias[layers])
    return {name: guesses(config, params, seen[name], top, target, tuned) for name in points}


def logits_of(config: Phi3Config, params: Params, residual: jax.Array, is_normalized: bool = False) -> jax.Array:
    """The final norm and the head: residual stream [..., D] -> logits float32 [..., V].

    Of what is normalised already only the norm's weight is left.
    """

    def method(model: Any, x: jax.Array) -> jax.Array:
        if is_normalized:
            return model.unembed((model.norm() * x).astype(x.dtype))
        return model.unembed(rms_norm(x, model.norm(), config.rms_norm_eps))

    return jnp.asarray(Phi3(config).apply({"params": params}, residual, method=method))


@functools.partial(jax.jit, static_argnames=("config", "top"))
def guesses(
    config: Phi3Config,
    params: Params,
    residual: jax.Array,
    top: int,
    target: jax.Array | None,
    tuned: TunedLens | None = None,
) -> Guesses:
    """`logit_lens` of a residual stream [L, B, T, D] that one has read, of any layers; `tuned` is of the same ones."""
    shape = residual.shape[:-1]  # [L, B, T]
    if tuned is not None:
        x = unit(residual, config.rms_norm_eps)
        x = jnp.einsum("LBTI,LOI->LBTO", x, tuned.weight, precision=jax.lax.Precision.HIGHEST)
        residual = (x + tuned.bias[:, None, None]).astype(residual.dtype)
    wanted = jnp.broadcast_to(0 if target is None else target, shape)

    def of_some(some: tuple[jax.Array, jax.Array]) -> Guesses:
        x, wanted = some
        logits = logits_of(config, params, x, is_normalized=tuned is not None)  # [R, V]
        highest, ids = jax.lax.top_k(logits, top)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
        rank = (logits > own).sum(axis=-1, dtype=jnp.int32)
        return Guesses(ids, jnp.exp(highest - total), jnp.exp(own - total)[:, 0], rank)

    found = in_steps(of_some, (residual.reshape(-1, residual.shape[-1]), wanted.reshape(-1)))
    found = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), found)
    return found._replace(target_probability=None, target_rank=None) if target is None else found


def in_steps(function: Callable[[Any], Any], arrays: Any) -> Any:
    """A function of arrays [R, ...], all called with the same few rows of R at a time."""
    R = jax.tree.leaves(arrays)[0].shape[0]
    size = min(R, ROWS)

    def split(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, [(0, -R % size)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(-1, size, *array.shape[1:])

    found = jax.lax.map(function, jax.tree.map(split, arrays))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:R], found)

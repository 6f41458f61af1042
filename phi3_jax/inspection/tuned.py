"""A map per layer from its residual stream to that of the end, which makes the logit lens readable in early layers.

The tuned lens (arXiv:2303.08112) trains such maps by descent on the KL divergence from the model's answer, which takes
the head forwards and backwards for every token, layer and step. Here they are fitted by least squares instead
(arXiv:2303.09435), in one pass over a text and in closed form: of the normalised streams, because the last norm only
looks at the direction.

Axis letters: L layer, B batch, T query, D model, R tokens of a batch that count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.running import compiled
from phi3_jax.model import Params
from phi3_jax.model.points import Hooks

_exact: Any = {"precision": jax.lax.Precision.HIGHEST}


class TunedLens(NamedTuple):
    """normalised last stream = weight @ normalised stream after a layer + bias; the last layer's is the identity.

    The result is not normalised again: it is shorter where the layer tells less, and the guesses are then less sure.

    Attributes:
      weight: float32 [L, D, D], [out, in].
      bias: float32 [L, D].
    """

    weight: jax.Array
    bias: jax.Array


class _Sums(NamedTuple):
    """Over tokens: how many, and sums of x, of y, of x times x, and of y times x, y being the last layer's x."""

    tokens: jax.Array  # [], how many
    x: jax.Array  # [L, D]
    xx: jax.Array  # [L, D, D]
    yx: jax.Array  # [L, D, D]


def fit_tuned_lens(config: Phi3Config, params: Params, texts: Iterable[Any], *, ridge: float = 1e-2) -> TunedLens:
    """Fits a lens for `logit_lens(tuned=)` to how the model reads some texts: some thousand tokens of what it will see.

    Args:
      texts: batches int [B, T], of one shape, so that there is one program. Of each row the first token is left out:
        its stream is unlike all others'.
      ridge: how much the maps are held small, as a part of the mean square of what they read. More helps where there
        are few tokens.

    Raises:
      ValueError: fewer tokens than D.
    """
    sums: _Sums | None = None
    for tokens in texts:
        new = _sums(config, params, jnp.asarray(tokens))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    if sums is None or sums.tokens < config.hidden_size:
        found = 0 if sums is None else int(sums.tokens)
        raise ValueError(
            f"{found} tokens, the first of each row not counted, are too few to fit maps of {config.hidden_size} inputs"
        )
    return _solved(sums, ridge)


def unit(x: jax.Array, eps: float) -> jax.Array:
    """x [..., D] divided by the root of its mean square, as the final norm does before its weight -> float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@functools.partial(jax.jit, static_argnames="config")
def _sums(config: Phi3Config, params: Params, tokens: jax.Array) -> _Sums:
    seen, _ = compiled(config, params, tokens, None, None, Hooks(("resid_post",)))
    x = unit(seen["resid_post"][:, :, 1:], config.rms_norm_eps)  # [L, B, T - 1, D]
    R = jnp.float32(x.shape[1] * x.shape[2])
    xx = jnp.einsum("LBTI,LBTJ->LIJ", x, x, **_exact)
    return _Sums(R, x.sum(axis=(1, 2)), xx, jnp.einsum("BTO,LBTI->LOI", x[-1], x, **_exact))


@jax.jit
def _solved(sums: _Sums, ridge: float) -> TunedLens:
    D = sums.x.shape[-1]
    mean = sums.x / sums.tokens

    def of_layer(layer: tuple[jax.Array, ...]) -> TunedLens:
        own, xx, yx = layer
        xx = xx / sums.tokens - jnp.outer(own, own)
        xx = xx + ridge * jnp.trace(xx) / D * jnp.eye(D)
        weight = jax.scipy.linalg.solve(xx, (yx / sums.tokens - jnp.outer(mean[-1], own)).T, assume_a="pos").T
        return TunedLens(weight, mean[-1] - jnp.matmul(weight, own, **_exact))

    found = jax.lax.map(of_layer, (mean, sums.xx, sums.yx))
    return TunedLens(found.weight.at[-1].set(jnp.eye(D)), found.bias.at[-1].set(0))

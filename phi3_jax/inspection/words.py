"""What the model's tables know of words, and how sure it is: nearest tokens, entropy, surprise.

Axis letters: B batch, T query, D model, V vocab, k neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.config import Phi3Config
from phi3_jax.kernels import LoraTensor
from phi3_jax.kernels.linear import rows
from phi3_jax.model import Params

Table = Literal["input", "output"]
_AT_ONCE = 4096  # rows of a table that become floats at once


def token_rows(params: Params, ids: Any, table: Table = "input") -> jax.Array:
    """The rows of tokens, float32 [..., D]: of the embedding ("input"), or of the head ("output").

    A tied model's head is its embedding, unless an adapter has parted them. Weights may be of any kind. An id that is
    out of range gives NaN.
    """
    weight = _table(params, table)
    ids = jnp.asarray(ids, jnp.int32)
    if isinstance(weight, LoraTensor) and weight.gain is not None:  # DoRA of a head: each row times its gain
        plain = rows(dataclasses.replace(weight, gain=None), ids)
        return plain.astype(jnp.float32) * weight.gain[jnp.clip(ids, 0, weight.shape[0] - 1)][..., None]
    return rows(weight, ids).astype(jnp.float32)


def nearest(
    config: Phi3Config,
    params: Params,
    vectors: Any,
    *,
    top: int = 8,
    table: Table = "input",
    exclude: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array]:
    """The tokens whose rows point most nearly where vectors do -> ids int32 [..., k], cosines float32 [..., k].

    Args:
      vectors: float [..., D]: rows of tokens (`token_rows`), or anything else that lives in the residual stream.
      exclude: tokens that are not wanted, the word itself for instance.

    Raises:
      ValueError: vectors of another size than D; `top` is more than there are.
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    if vectors.shape[-1:] != (config.hidden_size,):
        raise ValueError(f"vectors of shape {vectors.shape}: the last axis must be {config.hidden_size}")
    exclude = sorted(set(exclude))
    if not 1 <= top <= config.vocab_size - len(exclude):
        raise ValueError(f"top={top}: there are {config.vocab_size - len(exclude)} tokens")
    return _nearest(config, params, vectors, jnp.asarray(exclude, jnp.int32), top, table)


def analogy(
    config: Phi3Config,
    params: Params,
    plus: Sequence[int],
    minus: Sequence[int],
    *,
    top: int = 8,
    table: Table = "input",
) -> tuple[jax.Array, jax.Array]:
    """ "king" - "man" + "woman" (arXiv:1301.3781): the tokens nearest to a sum of rows -> ids [k], cosines [k].

    As there, the words themselves are left out. Each row is divided by its norm before it is added (Mikolov, Yih and
    Zweig, 2013).

    Args:
      plus: tokens whose rows are added: king, woman.
      minus: tokens whose rows are taken off: man.
    """
    whole = token_rows(params, [*plus, *minus], table)
    signs = jnp.asarray([1.0] * len(plus) + [-1.0] * len(minus))
    total = (signs[:, None] * _unit(whole)).sum(axis=0)
    return nearest(config, params, total, top=top, table=table, exclude=(*plus, *minus))


def entropy(logits: jax.Array) -> jax.Array:
    """How open the next token is, in nats: logits [..., V] -> float32 [...]; 0 is certainty, log V is none."""
    logs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    return -jnp.where(logs == -jnp.inf, 0.0, jnp.exp(logs) * logs).sum(axis=-1)


def surprise(logits: jax.Array, tokens: Any, token_positions: Any = None) -> jax.Array:
    """-log p of each token, in nats, given those before it: float32 [B, T]; NaN where there are none, and at padding.

    Args:
      logits: float [B, T, V], as the model gives them for these tokens.
      tokens: int [B, T].
      token_positions: int32 [B, T], -1 for padding; by default 0, 1, 2, ...
    """
    tokens = jnp.asarray(tokens)
    logs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    told = -jnp.take_along_axis(logs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    told = jnp.pad(told, ((0, 0), (1, 0)), constant_values=jnp.nan)
    return told if token_positions is None else jnp.where(jnp.asarray(token_positions) >= 1, told, jnp.nan)


def _table(params: Params, table: Table) -> Any:
    if table not in ("input", "output"):
        raise ValueError(f"there is no table {table!r}: name input or output")
    name = "lm_head" if table == "output" and "lm_head" in params else "embed_tokens"
    return params[name]["weight"]


@functools.partial(jax.jit, static_argnames=("config", "top", "table"))
def _nearest(
    config: Phi3Config, params: Params, vectors: jax.Array, exclude: jax.Array, top: int, table: Table
) -> tuple[jax.Array, jax.Array]:
    V, wanted = config.vocab_size, _unit(vectors)

    def of_some(ids: jax.Array) -> jax.Array:
        own = _unit(token_rows(params, jnp.minimum(ids, V - 1), table))
        return jnp.einsum("...D,RD->R...", wanted, own, precision=jax.lax.Precision.HIGHEST)

    size = min(_AT_ONCE, V)
    cosines = jax.lax.map(of_some, jnp.arange(V + -V % size, dtype=jnp.int32).reshape(-1, size))
    cosines = jnp.moveaxis(cosines.reshape(-1, *vectors.shape[:-1])[:V], 0, -1)  # [..., V]
    highest, ids = jax.lax.top_k(cosines.at[..., exclude].set(-2.0), top)
    return ids, highest


def _unit(x: jax.Array) -> jax.Array:
    """Each row divided by its norm; a row of zeros, as of ids that no token has, stays so."""
    norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norms == 0, 1.0, norms)

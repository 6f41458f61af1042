"""What each head does: where it looks, how sharply, and what happens without it.

A score of a head is the weight that its queries give to one kind of key, averaged over those queries that see such a
key and are not their text's first token. So 1 means "always there", whatever the window, and padding counts nowhere.

Axis letters: L layer, B batch, T query, S key (here as many), N query heads, H head dim, P chosen positions, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.edits import replace, zero
from phi3_jax.inspection.patching import sweep
from phi3_jax.inspection.running import by_layer, in_rows, run
from phi3_jax.kernels.attention.masks import attention_mask
from phi3_jax.model import Params
from phi3_jax.model.points import Edit

_exact: Any = {"precision": jax.lax.Precision.HIGHEST}
AT_ONCE = 1 << 28  # bytes of patterns that exist at a time


class HeadScores(NamedTuple):
    """Scores of every head, float32 [L, N]; NaN where no query sees such a key.

    Attributes:
      previous: the weight on the token before.
      first: the weight on the text's first token, where heads rest that have found nothing ("attention sink").
      self: the weight on the token itself.
      induction: the weight on tokens that came after an earlier occurrence of the query's token (arXiv:2209.11895): a
        head that looks there can repeat what followed last time. On a random sequence that is there twice, nothing
        else leads there.
      entropy: of the weights, in nats: 0 looks at one token, log(t + 1) at all t + 1 equally.
    """

    previous: jax.Array
    first: jax.Array
    self: jax.Array
    induction: jax.Array
    entropy: jax.Array


def head_scores(
    config: Phi3Config, params: Params, tokens: Any, *, token_positions: Any = None, edits: Sequence[Edit] = ()
) -> HeadScores:
    """Scores of every head on a text, or on a repeated random sequence, which shows induction.

    Args:
      tokens: int [B, T], the same ones twice for induction: `jnp.tile(random, 2)`.
      token_positions: int32 [B, T], -1 for padding.
      edits: changes of the run.

    Raises:
      ValueError: what `run` raises.
    """
    tokens, positions = _placed(tokens, token_positions)
    steps = _patterns(config, params, tokens, token_positions, edits)
    parts = [pattern_scores(config, pattern, tokens, positions) for pattern in steps]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)


@functools.partial(jax.jit, static_argnames="config")
def pattern_scores(config: Phi3Config, pattern: jax.Array, tokens: jax.Array, positions: jax.Array) -> HeadScores:
    """`head_scores` of patterns that one has: float32 [L, B, N, T, T]; tokens and positions int32 [B, T]."""
    q, k = positions[:, :, None], positions[:, None, :]
    seen = attention_mask(positions, positions, config.sliding_window) & (q >= 1)
    follows = jnp.pad(tokens[:, None, :-1] == tokens[:, :, None], ((0, 0), (0, 0), (1, 0))) & (k >= 1) & (k < q)
    # What comes next is cut off where it would be the query itself: "a a" looks at itself.
    kinds = {"previous": k == q - 1, "first": k == 0, "self": k == q, "induction": follows}
    scores = {name: _share(pattern, seen & kind) for name, kind in kinds.items()}
    logs = jnp.log(jnp.where(pattern > 0, pattern, 1.0))
    asked = q[:, :, 0] >= 1
    entropy = -jnp.einsum("LBNTS,LBNTS,BT->LN", pattern, logs, asked, **_exact) / asked.sum()
    return HeadScores(**scores, entropy=entropy)


def rollout(config: Phi3Config, params: Params, tokens: Any, *, token_positions: Any = None) -> jax.Array:
    """Attention rollout (arXiv:2005.00928): how much of each token is in each place at the end -> [B, T, S].

    Heads are averaged, and half of each layer is the residual stream's: the product of (mean + 1) / 2 over the layers.
    Rows sum to 1; those of padding are 0. Most heads of many models rest on the first token, and it then gets nearly
    everything.

    Args:
      tokens: int [B, T].
      token_positions: int32 [B, T], -1 for padding.
    """
    tokens, positions = _placed(tokens, token_positions)
    whole = jnp.broadcast_to(jnp.eye(tokens.shape[1]), (*tokens.shape, tokens.shape[1]))
    for pattern in _patterns(config, params, tokens, token_positions, ()):
        whole = rolled(whole, pattern)
    return whole * (positions >= 0)[..., None]


@jax.jit
def rolled(whole: jax.Array, pattern: jax.Array) -> jax.Array:
    """`rollout` [B, T, S] taken on through layers whose patterns [some of L, B, N, T, S] one has."""

    def step(whole: jax.Array, own: jax.Array) -> tuple[jax.Array, None]:
        mixed = jnp.einsum("BTS,BSR->BTR", own.mean(axis=1), whole, **_exact)
        return (mixed + whole) / 2, None

    return jax.lax.scan(step, whole, pattern)[0]


def ablation(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    metric: Callable[[jax.Array], jax.Array],
    *,
    mean: bool = False,
    token_positions: Any = None,
    **options: Any,
) -> jax.Array:
    """What each head is worth: the metric without it, less the metric with it -> [L, N, ...].

    Args:
      metric: of the last token's logits float32 [B, V], an array, as for `sweep`.
      mean: put the head's mean output over the tokens in its place, rather than zeros: what it does anyway, whatever
        the token, is left.
      token_positions: int32 [B, T], -1 for padding.
      options: layers and at_once, see `sweep`.

    Raises:
      ValueError: what `sweep` raises.
    """
    tokens, spots = _placed(tokens, token_positions)
    if mean:
        z = run(config, params, tokens, ["attn.z"], token_positions=token_positions)["attn.z"]
        there = (spots >= 0)[None, :, :, None, None]
        total = jnp.where(there, z.astype(jnp.float32), 0).sum(axis=(1, 2), keepdims=True)
        edit = replace(config, "attn.z", total / there.sum())
    else:
        edit = zero(config, "attn.z")
    last = np.asarray(spots).argmax(axis=-1)[:, None]
    logits = run(config, params, tokens, positions=last, token_positions=token_positions)["logits"][:, 0]
    without = sweep(config, params, tokens, edit, metric, heads=None, token_positions=token_positions, **options)
    return without - metric(logits)


def _placed(tokens: Any, token_positions: Any) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.shape}")
    return tokens, in_rows(tokens, np.arange(tokens.shape[1]) if token_positions is None else token_positions)


def _patterns(
    config: Phi3Config, params: Params, tokens: jax.Array, token_positions: Any, edits: Sequence[Edit]
) -> Iterator[jax.Array]:
    """Patterns [some of L, B, N, T, S], of as many layers at once as AT_ONCE allows."""
    B, T = tokens.shape
    L, bytes_of_layer = config.num_hidden_layers, 4 * B * config.num_attention_heads * T * T
    at_once = max(1, min(L, AT_ONCE // bytes_of_layer))
    options: Any = {"token_positions": token_positions, "edits": edits}
    for _, seen in by_layer(config, params, tokens, ["attn.pattern"], at_once=at_once, **options):
        yield seen["attn.pattern"]


def _share(pattern: jax.Array, wanted: jax.Array) -> jax.Array:
    """The mean weight [L, N] on the wanted keys (bool [B, T, S]), over the queries that have one."""
    given = jnp.einsum("LBNTS,BTS->LN", pattern, wanted.astype(pattern.dtype), **_exact)
    return given / wanted.any(axis=-1).sum()

"""The values of one run that a report is made of, and what follows from them, as NumPy arrays.

Axis letters: L layer, T token, S key, N query heads, H head dim, D model, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import Checkpoint, KVCache, Phi3, Phi3Config, inspection
from phi3_jax.kernels import LoraTensor, PerLayer
from phi3_jax.kernels.linear import linear, rows
from phi3_jax.model.decoder import rms_norm
from phi3_jax.model.points import OUTER

from ..engine.buckets import own_cache_dtype

Seen = dict[str, np.ndarray]
_READS = (
    "embed",
    "attn.pattern",
    "attn.z",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
    "ln_final.scale",
    "logits",
)
_TABLE_ROWS = 8192  # of the embedding that are compared at a time


def read(checkpoint: Checkpoint, ids: Sequence[int], reads: Sequence[str] = _READS) -> Seen:
    """Runs a prompt as the programs do, with a cache -> float32 values by the points' names, without the batch's axis.

    Raises ValueError where what is read would take too much memory (`inspection.run`).
    """
    config = checkpoint.config
    # Keys and values are rounded as where answers are generated: the numbers are those of phi3-generate.
    cache = KVCache.create(config, 1, len(ids), own_cache_dtype(checkpoint))
    tokens = np.asarray([ids], np.int32)
    seen, _ = inspection.run(config, checkpoint.params, tokens, reads, cache=cache)
    seen = {name: np.asarray(value, np.float32).squeeze(0 if name in OUTER else 1) for name, value in seen.items()}
    if "attn.pattern" in seen:
        seen["attn.pattern"] = seen["attn.pattern"][..., : len(ids)]  # a cache may have more slots than were asked for
    return seen


@functools.partial(jax.jit, static_argnames=("config", "most"))
def says(config: Phi3Config, params: Any, stream: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The logit lens (nostalgebraist 2020): the final norm and the head on the residual stream [T, D] of any place.

    Returns:
      (ids int32 [T, most] of the likeliest tokens, their probabilities float32 [T, most]).
    """
    normed = rms_norm(stream, params["norm"]["weight"], config.rms_norm_eps)
    logits: Any = Phi3(config).apply({"params": params}, normed, method="unembed")
    values, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), most)
    return ids, values


def nearest(checkpoint: Checkpoint, ids: Sequence[int], most: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens whose embeddings have the largest cosine with those of `ids`, themselves left out.

    Returns:
      (ids int [T, most], cosines float32 [T, most]), falling.
    """
    table, V = checkpoint.params["embed_tokens"]["weight"], checkpoint.config.vocab_size
    own = _directions(table, jnp.asarray(ids))
    cosines = np.concatenate(
        [
            np.asarray(own @ _directions(table, jnp.arange(start, min(start + _TABLE_ROWS, V))).T)
            for start in range(0, V, _TABLE_ROWS)
        ],
        axis=1,
    )
    cosines[np.arange(len(ids)), list(ids)] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(most, V - 1)]
    return order, np.take_along_axis(cosines, order, axis=1)


@jax.jit
def _directions(table: Any, ids: jax.Array) -> jax.Array:
    found = rows(table, ids).astype(jnp.float32)
    length = jnp.linalg.norm(found, axis=-1, keepdims=True)
    return found / jnp.where(length == 0, 1, length)  # rows of zeros, which some tables are padded with, point nowhere


def attribution(checkpoint: Checkpoint, seen: Seen, token: int) -> dict[str, Any]:
    """What each part of the model has added to a token's logit at the last position (direct logit attribution).

    The norm's scale is taken as it was; then the logit is a sum over all that was added to the residual stream.

    Returns:
      embed (a number), heads float [L, N], mlps float [L].
    """
    params, config = checkpoint.params, checkpoint.config
    direction = _head_row(params, token) * np.asarray(params["norm"]["weight"], np.float64)
    direction = direction / float(seen["ln_final.scale"][-1])
    o_proj, z = params["layers"]["self_attn"]["o_proj"]["weight"], seen["attn.z"][:, -1]
    alone = z[:, :, None] * np.eye(config.num_attention_heads, dtype=np.float32)[..., None]  # [L, N, N, H]
    alone = alone.reshape(*z.shape[:2], -1)
    heads = [
        np.asarray(_added(alone[i], *((o_proj[i], None) if isinstance(o_proj, PerLayer) else (o_proj, jnp.int32(i)))))
        for i in range(config.num_hidden_layers)
    ]
    return {
        "embed": float(seen["embed"][-1] @ direction),
        "heads": np.stack(heads).astype(np.float64) @ direction,
        "mlps": seen["mlp_out"][:, -1].astype(np.float64) @ direction,
    }


@jax.jit
def _added(alone: jax.Array, o_proj: Any, layer: jax.Array | None) -> jax.Array:
    """What each head adds to the stream: alone [N, N H] -> [N, D]."""
    return linear(alone, o_proj, layer)


def _head_row(params: Any, token: int) -> np.ndarray:
    """The output head's row of a token, float64 [D]."""
    head, ids = params.get("lm_head", params["embed_tokens"])["weight"], jnp.asarray([token])
    if isinstance(head, LoraTensor) and head.gain is not None:  # DoRA: `rows` leaves its magnitudes out
        plain = LoraTensor(head.base, head.a, head.b, None, None, head.scaling, 0.0)
        return np.asarray(rows(plain, ids)[0] * head.gain[token], np.float64)
    return np.asarray(rows(head, ids)[0], np.float64)


def head_scores(pattern: np.ndarray) -> dict[str, np.ndarray]:
    """What heads look at, on average over tokens, of their weights float [L, N, T, S] -> [L, N] each.

    previous, first: the weight of the token before, and of the first token, over all tokens but the first, which has
    no choice; self: that of the token itself, over all; entropy: of the weights, in nats, over all but the first.
    """
    places = np.arange(pattern.shape[2])
    weights = pattern.astype(np.float64)
    logs = np.log(np.where(weights > 0, weights, 1))
    later = places[1:]
    none = np.zeros(pattern.shape[:2])
    return {
        "previous": weights[:, :, later, later - 1].mean(-1) if len(later) else none,
        "first": weights[:, :, later, 0].mean(-1) if len(later) else none,
        "self": weights[:, :, places, places].mean(-1),
        "entropy": -(weights * logs).sum(-1)[:, :, 1:].mean(-1) if len(later) else none,
    }


def induction(checkpoint: Checkpoint, length: int = 24, seed: int = 0) -> np.ndarray:
    """Each head's weight on the token behind the earlier copy of the present one, [L, N] (Olsson et al. 2022).

    Random tokens are read twice in a row; the mean is over the second reading.
    """
    config = checkpoint.config
    most = min(config.sliding_window or length, (config.max_position_embeddings - 1) // 2)
    length = max(1, min(length, most))  # further back lies what a window hides
    once = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
    pattern = read(checkpoint, once + once, ("attn.pattern",))["attn.pattern"]
    second = np.arange(length, 2 * length)
    return pattern[:, :, second, second - length + 1].mean(-1)


def rollout(pattern: np.ndarray) -> np.ndarray:
    """How much of the last token comes from each token, float [T] (attention rollout, arXiv:2005.00928).

    A layer is half its heads' mean weights and half the stream that passes by; layers are multiplied.
    """
    last = np.eye(pattern.shape[2])[-1]
    for weights in pattern.astype(np.float64).mean(axis=1)[::-1]:
        last = 0.5 * (last @ weights) + 0.5 * last
    return last


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 [..., V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

"""Batches and steps for the tests of training, and the obvious way to compute with them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax.train.data import Batch
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import make_train_step, start

PLAIN: dict[str, Any] = {"train": "all", "schedule": "constant", "warmup_steps": 0, "beta2": 0.95, "loss_chunk": 0}
train_step = functools.cache(make_train_step)


def settings(**changes):
    return Settings(**{**PLAIN, "batch_size": 2, "lr": 1e-2, "lora_rank": 2, **changes})


def rows(lengths: Sequence[Sequence[int]], length: int, vocab: int, seed: int = 0, learned: float = 0.6) -> Batch:
    """A batch [B, T]; each row has texts of these lengths, of which random tokens are learned. Padding is noise."""
    rng = np.random.default_rng(seed)
    B, T = len(lengths), length
    tokens = rng.integers(4, vocab, (B, T), dtype=np.int32)
    weights, positions = np.zeros((B, T), np.float32), np.full((B, T), -1, np.int32)
    segments = np.zeros((B, T), np.int32)
    for i, row in enumerate(lengths):
        start = 0
        for number, size in enumerate(row):
            where = slice(start, start + size)
            positions[i, where], segments[i, where] = np.arange(size), number
            weights[i, start + 1 : start + size] = rng.random(size - 1) < learned
            start += size
        segments[i, start:] = len(row)
    return Batch(tokens, weights, positions, segments)


def stack(*parts: Any) -> Any:
    """[A, B, T] from A batches [B, T]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def texts(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of each text, out of the rows."""
    found = []
    for tokens, weights, positions, segments in zip(
        batch.tokens, batch.weights, batch.positions, batch.segments, strict=True
    ):
        for number in np.unique(segments[positions >= 0]):
            where = (segments == number) & (positions >= 0)
            found.append((tokens[where], weights[where]))
    return found


def text_loss(config: phi3_jax.Phi3Config, params: Any, tokens: np.ndarray, weights: np.ndarray) -> jax.Array:
    """The weighted sum of -log p of one text, alone in a row, from all its logits."""
    log_p = jax.nn.log_softmax(phi3_jax.Phi3(config).apply({"params": params}, jnp.asarray(tokens)[None])[0])
    return -(log_p[np.arange(len(tokens) - 1), tokens[1:]] * weights[1:]).sum()


def slow_loss(config: phi3_jax.Phi3Config, params: Any, batch: Batch) -> jax.Array:
    """The mean of a batch [B, T], text by text."""
    total = sum(text_loss(config, params, *text) for text in texts(batch))
    return total / sum(weights[1:].sum() for _, weights in texts(batch))


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Every leaf within `tolerance` of its largest number, and of 1."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        atol = tolerance * max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


PARTS = [rows([[9, 4], [3]], 21, 97, 1), rows([[17], [21]], 21, 97, 2), rows([[2], [5]], 21, 97, 3)]


def run(settings, config, params, batches, trainable=None):
    """Steps -> (state, frozen, metrics of each as a dict of arrays)."""
    state, frozen = start(settings, config, params)
    if trainable is not None:
        state = dataclasses.replace(state, trainable=trainable)
    step, curve = train_step(settings, config), []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        curve.append(metrics)
    return state, frozen, {name: np.array([float(m[name]) for m in curve]) for name in curve[0]}

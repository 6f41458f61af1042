"""The rows that write their answers, all in one call of the compiled loop.

The host knows every row's tokens; on the device are their keys and values, and what the loop needs, which is made anew
whenever a row comes or goes. There are as many rows as the rung that load asks for (buckets.py).

Axis letters: L layer, B batch, K key-value heads, S cache slot, H head dim, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...engine import decoding
from ...engine.news import News, no_news
from ...sampling.logprobs import LogprobRecord
from .options import Sizes
from .sequence import Row, settings_of

_BLOCK = 128  # slots that are copied at a time
_PATIENCE = 16  # calls with a smaller load before rows are moved together


class Batch:
    """Attributes:
    rows: the row at each place of the batch; None where there is none.
    """

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, top_logprobs: int):
        self._checkpoint, self._sizes, self._top_logprobs = checkpoint, sizes, top_logprobs
        self.rows: list[Row | None] = []
        self._cache: KVCache | None = None
        self._state: decoding.DecodeState | None = None  # None: to be made anew of `rows` and the cache
        self._settings: decoding.Settings | None = None
        self._calm = 0

    def join(self, row: Row, cache: KVCache) -> None:
        """Adds a row, whose keys and values are the only row of `cache`."""
        used = sum(each is not None for each in self.rows)
        if used == len(self.rows):
            self._resize(next(rung for rung in self._sizes.rungs if rung > used))
        place = self.rows.index(None)
        self._put(place, cache, 0, len(row.tokens))
        self.rows[place] = row

    def leave(self, row: Row) -> None:
        """Takes a row out."""
        place = self.rows.index(row)
        self._settle()
        self.rows[place] = None

    def write(self, params: Any, steps: int) -> list[tuple[Row, list[int], int, bool]]:
        """Up to `steps` new tokens for each row -> (row, its new tokens, flag of failures.py, whether it is done)."""
        self._shrink()
        if self._state is None:
            self._state = self._new_state()
        state, config = self._state, self._checkpoint.config
        assert self._settings is not None
        if any(row is not None and row.masks is not None for row in self.rows):
            state, last = decoding.step(config, params, state)
            allowed = np.stack([self._allowed(row) for row in self.rows])
            state = decoding.answer(config, params, state, last, self._settings, jnp.asarray(allowed))
        else:
            state, _ = decoding.decode(config, params, state, self._settings, jnp.int32(steps))
        self._state = state
        news = News.read(state.news, len(self.rows))
        there = [(place, row) for place, row in enumerate(self.rows) if row is not None]
        return [
            (row, news.tokens[place, : news.counts[place]].tolist(), int(news.failed[place]), bool(news.done[place]))
            for place, row in there
        ]

    def logprobs(self, row: Row, token_ids: list[int]) -> Any:
        """The log-probabilities of the tokens that the last call wrote; None if the row does not want them."""
        if row.job.logprobs is None or self._state is None or self._state.logprobs is None:
            return None
        begin = len(row.tokens) - len(token_ids)
        return self._state.logprobs.read(self.rows.index(row), token_ids, begin)

    def _allowed(self, row: Row | None) -> np.ndarray:
        words = -(-self._checkpoint.config.vocab_size // 32)
        return np.full(words, 0xFFFFFFFF, np.uint32) if row is None else row.allowed(words)

    def _settle(self) -> None:
        """Takes the cache out of the state, which has to be made anew."""
        if self._state is not None:
            self._cache, self._state = self._state.cache, None

    def _put(self, place: int, cache: KVCache, row: int, length: int) -> None:
        self._settle()
        assert self._cache is not None
        blocks = -(-min(length, cache.capacity) // _BLOCK)
        self._cache = copy_row(self._cache, jnp.int32(place), cache, jnp.int32(row), jnp.int32(blocks))

    def _resize(self, rung: int) -> None:
        """Moves all rows into a cache of `rung` rows."""
        self._settle()
        old, rows, config = self._cache, self.rows, self._checkpoint.config
        self._cache = KVCache.create(config, rung, self._sizes.capacity, self._sizes.dtype, unset=True)
        self.rows = [None] * rung
        for place, (origin, row) in enumerate((i, row) for i, row in enumerate(rows) if row is not None):
            assert old is not None
            self._put(place, old, origin, len(row.tokens))
            self.rows[place] = row

    def _shrink(self) -> None:
        """Moves the rows to a smaller rung if they have fitted into one for a while."""
        used = sum(row is not None for row in self.rows)
        rung = next(rung for rung in self._sizes.rungs if rung >= used)
        self._calm = self._calm + 1 if rung < len(self.rows) else 0
        if self._calm > _PATIENCE:
            self._calm = 0
            self._resize(rung)

    def _new_state(self) -> decoding.DecodeState:
        assert self._cache is not None
        B, room, config = len(self.rows), self._sizes.room, self._checkpoint.config
        tokens, lengths = np.zeros((B, room), np.int32), np.ones(B, np.int32)
        for place, row in enumerate(self.rows):
            if row is not None:
                lengths[place] = len(row.tokens)
                tokens[place, : lengths[place]] = row.tokens
        wants = any(row is not None and row.job.logprobs is not None for row in self.rows)
        border = None if config.long_rope is None else config.long_rope.original_max_position_embeddings
        # The factors of a row's keys are those it was read with, and stay so until it is read again.
        rope = [
            0 if row is None or border is None else border + 1 if row.was_long else min(border, len(row.tokens))
            for row in self.rows
        ]
        zeros = np.zeros(B, np.int32)
        self._settings = settings_of(self.rows, self._checkpoint)
        return decoding.DecodeState(
            cache=self._cache,
            tokens=jnp.asarray(tokens),
            lengths=jnp.asarray(lengths),
            done=jnp.asarray([row is None for row in self.rows]),
            rope_lengths=jnp.asarray(rope, jnp.int32),
            offered=jnp.asarray(zeros),
            taken=jnp.asarray(zeros.copy()),
            failed=jnp.asarray(zeros.copy()),
            news=no_news(B),
            logprobs=LogprobRecord.create(B, room, self._top_logprobs) if wants else None,
        )


@functools.partial(jax.jit, donate_argnames="target")
def copy_row(target: KVCache, to: jax.Array, source: KVCache, row: jax.Array, blocks: jax.Array) -> KVCache:
    """The target with a row of the source in row `to`: the first `blocks` blocks of its slots, int32 scalars."""

    def copy(old: jax.Array, new: jax.Array) -> jax.Array:  # [L, B, K, S, ...]
        size = min(_BLOCK, old.shape[3])
        shape = (old.shape[0], 1, old.shape[2], size, *old.shape[4:])
        rest = [jnp.int32(0)] * (old.ndim - 4)

        def one(block: jax.Array, old: jax.Array) -> jax.Array:
            begin, zero = block * size, jnp.int32(0)
            part = jax.lax.dynamic_slice(new, (zero, row, zero, begin, *rest), shape)
            return jax.lax.dynamic_update_slice(old, part, (zero, to, zero, begin, *rest))

        return jax.lax.fori_loop(0, blocks, one, old)

    names = ("k", "v") if target.k_scale is None else ("k", "v", "k_scale", "v_scale")
    arrays = {name: copy(getattr(target, name), getattr(source, name)) for name in names}
    positions = jax.lax.dynamic_update_slice(target.positions, source.positions[row][None], (to, jnp.int32(0)))
    return dataclasses.replace(target, positions=positions, **arrays)

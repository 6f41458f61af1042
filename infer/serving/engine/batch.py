"""The rows that write their answers, all in one call of the compiled loop.

The host knows every row's tokens; on the device are their keys and values, and what the loop needs, which is made anew
whenever a row comes. There are as many rows as the rung that load asks for (buckets.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...engine import NewTokens, PromptLookup, decoding
from ...engine.news import News
from ...engine.speculation import LookupDrafter
from .chunks import move
from .options import EngineOptions, Sizes, most_guessed
from .sequence import Row
from .states import by_grammar, record_of, settings_of, state_of, wants_logprobs

Way = Literal["plain", "grammar", "guesses"]

# Calls with a smaller load before rows are moved together, at about 4 ms for each chunk of each row.
PATIENCE = 16


class Batch:
    """Attributes:
    rows: the row at each place of the batch; None where there is none.
    offered, taken: with speculation: how many tokens were guessed, and how many of them were right.
    """

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, options: EngineOptions):
        self._checkpoint, self._sizes, self._options = checkpoint, sizes, options
        self._drafter = LookupDrafter(PromptLookup(options.speculate)) if options.speculate else None
        self.rows: list[Row | None] = []
        self._cache: KVCache | None = None
        self._state: decoding.DecodeState | None = None  # None: to be made anew of `rows` and the cache
        self._settings: decoding.Settings | None = None
        self._calm = 0
        self._has_left = False  # since the last call
        self.offered = self.taken = 0

    @property
    def used(self) -> list[Row]:
        """The rows that are there."""
        return [row for row in self.rows if row is not None]

    def join(self, row: Row, cache: KVCache, expected: int = 1) -> None:
        """Adds a row, whose keys and values are the only row of `cache`; `expected` of them will soon be there."""
        if not self.used:
            rung = next((rung for rung in self._sizes.rungs if rung >= expected), self._sizes.rungs[-1])
            if rung != len(self.rows):
                self._resize(rung)
        elif len(self.used) == len(self.rows):
            self._resize(next(rung for rung in self._sizes.rungs if rung > len(self.rows)))
        place = self.rows.index(None)
        self._put(place, cache, 0, len(row.tokens))
        self.rows[place] = row

    def leave(self, row: Row) -> None:
        """Takes a row out."""
        place = self.rows.index(row)
        if row.is_spoiled:  # who comes there next must not meet NaN, which XLA's and the TPU's attention multiply by 0
            config, sizes = self._checkpoint.config, self._sizes
            self._put(place, KVCache.create(config, 1, sizes.capacity, sizes.dtype), 0, sizes.capacity)
        self.rows[place] = None
        self._has_left = True

    def shrink(self) -> None:
        """Moves the rows to the next smaller rung if they have fitted into it for some calls."""
        smaller = [rung for rung in self._sizes.rungs if len(self.used) <= rung < len(self.rows)]
        self._calm = self._calm + 1 if smaller else 0
        if self._calm > PATIENCE:
            self._resize(smaller[-1])

    def way(self) -> Way:
        """How these rows are written: token by token where a grammar has to be asked, with guesses where few are."""
        if any(row.masks is not None for row in self.used):
            return "grammar"
        has_guesses = self._drafter is not None and len(self.rows) <= most_guessed(self._options, self._sizes)
        return "guesses" if has_guesses else "plain"

    def write(self, params: Any, steps: int, way: Way | None = None) -> list[tuple[Row, NewTokens, bool]]:
        """Up to `steps` turns of the loop -> (row, what it got, whether it is done), of each row.

        Args:
          way: None for that of `way()`, which takes one step with a grammar.
        """
        if self._state is None:
            self._state = self._new_state()
        elif self._has_left:  # the device need not forget anything else of a row
            self._state = _without(self._state, self.rows)
        self._has_left = False
        state, config, settings, way = self._state, self._checkpoint.config, self._settings, way or self.way()
        assert settings is not None
        if way == "grammar":
            steps, settings = 1, by_grammar(settings, self.rows, self._checkpoint)
        drafter = self._drafter if way == "guesses" else None
        self._state, _ = decoding.decode(config, params, state, settings, jnp.int32(steps), drafter)
        return self._written(self._state)

    def _written(self, state: decoding.DecodeState) -> list[tuple[Row, NewTokens, bool]]:
        news = News.read(state.news, len(self.rows))
        tokens = np.asarray(state.tokens) if max(news.counts) > news.tokens.shape[1] else None
        results = []
        for place, row in enumerate(self.rows):
            if row is None:
                continue
            begin, count = len(row.tokens), news.counts[place]
            new = news.tokens[place, :count] if tokens is None else tokens[place, begin : begin + count]
            ids, logprobs = new.tolist(), None
            if row.job.logprobs is not None:
                assert state.logprobs is not None
                logprobs = state.logprobs.read(place, ids, begin)
            results.append((row, row.add(ids, logprobs, int(news.failed[place])), bool(news.done[place])))
        return results

    def settle(self) -> None:
        """Takes the cache out of the state, which has to be made anew, and counts guesses."""
        if self._state is not None:
            if self._drafter is not None:
                self.offered += int(self._state.offered.sum())
                self.taken += int(self._state.taken.sum())
            self._cache, self._state = self._state.cache, None

    def _put(self, place: int, cache: KVCache, row: int, length: int) -> None:
        self.settle()
        assert self._cache is not None
        for begin in range(0, min(length, cache.capacity), self._sizes.chunk):
            self._cache = move(self._cache, place, cache, row, begin, self._sizes.chunk)

    def _resize(self, rung: int) -> None:
        """Moves all rows into a cache of `rung` rows."""
        self.settle()
        self._calm = 0
        old, rows = self._cache, self.rows
        config, sizes = self._checkpoint.config, self._sizes
        self._cache = KVCache.create(config, rung, sizes.capacity, sizes.dtype, unset=True)
        self.rows = [None] * rung
        for place, (origin, row) in enumerate((i, row) for i, row in enumerate(rows) if row is not None):
            assert old is not None
            self._put(place, old, origin, len(row.tokens))
            self.rows[place] = row

    def _new_state(self) -> decoding.DecodeState:
        assert self._cache is not None
        self._settings = settings_of(self.rows, self._checkpoint, self._sizes)
        return state_of(self.rows, self._sizes, self._cache, record_of(self.rows, self._sizes))


def _without(state: decoding.DecodeState, rows: Sequence[Row | None]) -> decoding.DecodeState:
    """The state of these rows, of which some have left."""
    assert state.logprobs is not None
    record = dataclasses.replace(state.logprobs, wanted=wants_logprobs(rows))
    return dataclasses.replace(state, done=jnp.asarray(np.asarray([row is None for row in rows])), logprobs=record)

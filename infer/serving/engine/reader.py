"""A text on its way into the cache: a state of one row, read piece by piece between the calls that write answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...engine import NewTokens, decoding
from ...engine.buckets import piece_length
from ...engine.news import News
from ...sampling.logprobs import LogprobRecord
from . import chunks
from .options import Sizes
from .prefixes import Prefixes, Walk
from .sequence import Row
from .states import by_grammar, no_cache, record_of, settings_of, state_of


class Reader:
    """Reads the text that some rows have in common, and picks the next token of each.

    Attributes:
      rows: those that wait for it: several if they were asked for with one prompt.
      place: how many tokens have been read, or taken from the prefix cache.
      cache: keys and values of the one row that is read.
      is_clean: a token was picked after the text, so that none of them is NaN.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sizes: Sizes,
        row: Row,
        prefixes: Prefixes | None = None,
        memory: KVCache | None = None,
    ):
        """Begins at the text's beginning, in the memory of another reader that needs it no longer, if there is one."""
        self._checkpoint, self._sizes, self.rows = checkpoint, sizes, [row]
        self._length, self.place = len(row.tokens), 0
        # The prompt's own log-probabilities: a row that is read again has told them already.
        self._echo = row.job.echo and row.ticket.prompt_logprobs is None
        # With them the whole prompt is read, by another program, whose keys are not promised to be the same bits.
        self._prefixes = None if self._echo else prefixes
        self._walk: Walk | None = None
        self._reused, self.is_clean = 0, False
        if memory is None:
            cache = KVCache.create(checkpoint.config, 1, sizes.capacity, sizes.dtype, unset=True)
        else:
            cache = dataclasses.replace(memory, positions=jnp.asarray(np.full((1, memory.capacity), -1, np.int32)))
        record = LogprobRecord.create(1, sizes.width, sizes.top_logprobs) if self._echo else None
        self._state = state_of([row], sizes, cache, record)
        embedding = checkpoint.params["embed_tokens"]["weight"]
        self._last = jnp.zeros((1, embedding.shape[1]), embedding.dtype)

    @property
    def is_over(self) -> bool:
        """Whether all has been read."""
        return self.place >= self._length

    @property
    def cache(self) -> KVCache:
        """Keys and values so far; the next piece takes their memory."""
        return self._state.cache

    def serves(self, row: Row) -> bool:
        """Whether a row needs just this text, read in just this way."""
        one = self.rows[0]
        return (
            row.tokens == one.tokens
            and row.job.adapter == one.job.adapter
            and row.was_long == one.was_long
            and not row.job.echo
            and not self._echo
        )

    def read_piece(self, params: Any) -> None:
        """Reads the next chunk, or what is left of one; the first time, what comes after a known beginning."""
        if self._prefixes is not None and self.place == 0:
            self._take_known(self._prefixes)
        size = piece_length(self._length - self.place, 1, self._sizes.chunk, self._sizes.capacity)
        begin = self.place
        self._state, self._last = decoding.read(
            self._checkpoint.config, params, self._state, self._last, jnp.int32(begin), size, self._echo
        )
        self.place += size
        if self._walk is not None and begin + self._sizes.chunk <= self._length:
            # At once: a ring may overwrite it.
            length, cache = self._sizes.chunk, self.cache
            self._walk.add(lambda: chunks.take(cache, 0, begin, length), chunks.chunk_bytes(cache, length))
        if self.is_over:
            self.close()

    def _take_known(self, prefixes: Prefixes) -> None:
        """Copies the longest beginning of the text that is known, as far as the next token sees it."""
        row, window = self.rows[0], self._checkpoint.config.sliding_window
        self._walk = walk = prefixes.walk(row.tokens, (row.job.adapter, row.was_long))
        self.place = self._reused = end = walk.tokens
        if values := walk.values[chunks.first_needed(self._sizes.chunk, end, window) :]:
            self._state = dataclasses.replace(self._state, cache=chunks.place(self.cache, 0, values, end))

    def close(self) -> None:
        """What was taken from the prefix cache, or added to it, may be evicted from now on."""
        if self._walk is not None:
            self._walk.close()

    def answer(self, params: Any, row: Row) -> tuple[NewTokens, bool]:
        """Picks a row's token after the text -> (what it got, whether it is done)."""
        config, sizes = self._checkpoint.config, self._sizes
        if len(row.tokens) == len(row.job.prompt):
            row.ticket.reused = self._reused
        if self._echo:
            assert self._state.logprobs is not None
            row.ticket.prompt_logprobs = row.cut(self._state.logprobs.read(0, row.tokens, 0))
            if flag := int(News.read(self._state.news, 1).failed[0]):
                return row.add([], [], flag), True
        # The cache is not looked at, and other rows may need it.
        settings = by_grammar(settings_of([row], self._checkpoint, sizes), [row], self._checkpoint)
        cache, begin = no_cache(config, sizes.dtype), len(row.tokens)
        state = state_of([row], sizes, cache, record_of([row], sizes))
        state = decoding.answer(config, params, state, self._last, settings)
        news = News.read(state.news, 1)
        ids = news.tokens[0, : news.counts[0]].tolist()
        self.is_clean |= bool(ids)
        assert state.logprobs is not None
        told = None if row.job.logprobs is None else state.logprobs.read(0, ids, begin)
        return row.add(ids, told, int(news.failed[0])), bool(news.done[0])

"""A text on its way into the cache: a state of one row, read piece by piece between the calls that write others' answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint

from ...engine import decoding
from ...engine.buckets import piece_length
from ...engine.news import News
from .options import Sizes
from .sequence import Row, settings_of


class Reader:
    """Reads one row's text, and picks the next token.

    Attributes:
      place: how many tokens have been read.
    """

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, row: Row, top_logprobs: int):
        self._checkpoint, self._sizes, self.row = checkpoint, sizes, row
        self.place = 0
        tokens = np.zeros((1, sizes.room), np.int32)
        tokens[0, : len(row.tokens)] = row.tokens
        self._settings = settings_of([row], checkpoint)
        logprobs = None if row.job.logprobs is None else top_logprobs
        state = decoding.begin(
            checkpoint.config, self._settings, jnp.asarray(tokens), sizes.capacity, sizes.dtype, logprobs, unset=True
        )
        # A row that is read again has an answer already.
        length = jnp.asarray([len(row.tokens)], jnp.int32)
        self.state = dataclasses.replace(state, lengths=length, rope_lengths=self._settings.rope_lengths(length) + 0)
        embedding = checkpoint.params["embed_tokens"]["weight"]
        self._last = jnp.zeros((1, embedding.shape[1]), embedding.dtype)

    @property
    def is_over(self) -> bool:
        """Whether all has been read."""
        return self.place >= len(self.row.tokens)

    def read_piece(self, params: Any) -> None:
        """Reads the next chunk, or what is left of one."""
        size = piece_length(len(self.row.tokens) - self.place, 1, self._sizes.chunk, self._sizes.capacity)
        config, echo = self._checkpoint.config, self.row.job.echo and len(self.row.tokens) == len(self.row.job.prompt)
        self.state, self._last = decoding.read(
            config, params, self.state, self._last, jnp.int32(self.place), size, echo
        )
        self.place += size

    def answer(self, params: Any) -> News:
        """Picks the token after the text."""
        config, allowed = self._checkpoint.config, None
        if self.row.masks is not None:
            allowed = jnp.asarray(self.row.allowed(self.row.masks.words)[None])
        self.state = decoding.answer(config, params, self.state, self._last, self._settings, allowed)
        return News.read(self.state.news, 1)

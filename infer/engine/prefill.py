"""Reading rows of tokens into the cache, chunk by chunk: prompts, and texts that must be read again.

Axis letters: B batch, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.model import Params

from .buckets import piece_length
from .decoding import DecodeState


@dataclasses.dataclass
class Prefill:
    """The prefill of a batch, and how far it has come.

    Attributes:
      length: tokens of the longest row.
      chunk: the most tokens of a row that are read at a time.
      last: [B, D], the model's output at the last token of those rows whose last token has been read.
      place: how many tokens of each row have been read.
      echo: see `decoding.read`.
    """

    length: int
    chunk: int
    last: jax.Array
    place: int = 0
    echo: bool = False

    @classmethod
    def start(cls, params: Params, rows: int, length: int, chunk: int, place: int = 0, echo: bool = False) -> Prefill:
        """Begins to read `rows` rows at `place`, with the weights `params`."""
        embedding = params["embed_tokens"]["weight"]
        return cls(length, chunk, jnp.zeros((rows, embedding.shape[1]), embedding.dtype), place, echo)

    @property
    def is_over(self) -> bool:
        """Whether every row has been read to its end."""
        return self.place >= self.length

    def read_chunk(self, read: Callable[..., Any], state: DecodeState) -> DecodeState:
        """Reads the next chunk of every row; `read` is `decoding.read` of a model's config and weights."""
        size = piece_length(self.length - self.place, len(self.last), self.chunk, state.cache.capacity)
        state, self.last = read(state, self.last, jnp.int32(self.place), size, self.echo)
        self.place += size
        return state

    def read_all(self, read: Callable[..., Any], state: DecodeState) -> DecodeState:
        """Reads all that is left."""
        while not self.is_over:
            state = self.read_chunk(read, state)
        return state

"""Embeddings: the model's last hidden states at the tokens of a text, pooled into one vector of length 1.

Texts are read one at a time (B = 1), chunk by chunk, into a cache of their own, so that a vector does not depend on
what else is asked for, and nothing waits longer than for one chunk.

Axis letters: B batch, T tokens of a chunk, D model.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import typing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache, Params, Phi3, slots_needed

from ...engine.buckets import own_cache_dtype, piece_length
from .adapters import Adapters
from .jobs import QueueFull

Pooling = Literal["mean", "last"]
POOLINGS = typing.get_args(Pooling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Of the text that is being read: its keys and values; the sum of the hidden states so far, and that of its last
    token, float32 [D] each.
    """

    cache: KVCache
    total: jax.Array
    last: jax.Array


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _read(
    config: Phi3Config, params: Params, state: _State, tokens: jax.Array, begin: jax.Array, length: jax.Array
) -> _State:
    """Reads tokens [1, T], those of a text of `length` tokens from place `begin` on; at 0 it begins anew."""
    places = begin + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(places < length, places, -1)[None]
    is_first = (
        begin == 0
    )  # no query sees what is left of the text before, but attention reads the slots that are in use
    cache = dataclasses.replace(state.cache, positions=jnp.where(is_first, -1, state.cache.positions))
    # A text's length is known before it is read: LongRoPE's factors are those of the whole.
    options: Any = {"cache": cache, "rope_lengths": length[None, None]}
    read: Any = Phi3(config).apply({"params": params}, tokens, positions, **options, method="hidden")
    x, cache, _ = read
    x = x[0].astype(jnp.float32)  # [T, D]
    total = jnp.where(is_first, 0, state.total) + jnp.where(positions[0, :, None] >= 0, x, 0).sum(axis=0)
    is_last = positions[0] == length - 1
    last = jnp.where(is_last.any(), x[is_last.argmax()], state.last)
    return _State(cache, total, last)


@dataclasses.dataclass(eq=False)
class _Request:
    """Texts that were asked for together: their token ids, how they are pooled and with which adapter; the vectors of
    the first of them, and what becomes all of them.
    """

    texts: Sequence[Sequence[int]]
    pooling: Pooling
    adapter: str | None
    vectors: list[np.ndarray]
    future: Future[np.ndarray]


class Pooler:
    """Reads texts for their embeddings, one chunk in each turn.

    Requests take turns after every text, so that a long list does not hold up a short one.
    """

    def __init__(self, checkpoint: Checkpoint, adapters: Adapters, room: int, chunk: int, queue: int):
        """Sets the sizes; nothing is allocated before the first text.

        Args:
          adapters: of the model.
          room: the most tokens of a text.
          chunk: the most tokens that are read at a time.
          queue: the most requests that wait or are being read.
        """
        self.room, self._chunk, self._queue = min(room, checkpoint.config.max_position_embeddings), chunk, queue
        self._checkpoint, self._adapters = checkpoint, adapters
        self._capacity = max(slots_needed(checkpoint.config, self.room, chunk), chunk)
        self._requests: deque[_Request] = deque()
        self._lock = threading.Lock()  # of the requests: they come from other threads
        self._state: _State | None = None
        self._place = 0  # of the first request's text, up to which it was read

    @property
    def waiting(self) -> int:
        """How many requests wait or are being read."""
        return len(self._requests)

    def submit(
        self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean", adapter: str | None = None
    ) -> Future[np.ndarray]:
        """Takes texts, as token ids -> what will be float32 [len(texts), D], each row of length 1. From any thread.

        The future can be cancelled at any time before it is done; it has a ValueError if the hidden states of a text
        are not finite numbers.

        Args:
          pooling: "mean" of the hidden states at all tokens, or that at the "last" one, which alone has seen them all.
          adapter: by its name; None is the model itself.

        Raises:
          ValueError: a text is empty or too long, or has ids outside of the vocabulary; there is no such pooling, or no
            such adapter.
          QueueFull: too many requests wait.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not one of {POOLINGS}")
        self._adapters.require(adapter)
        vocabulary = self._checkpoint.config.vocab_size
        for number, tokens in enumerate(texts):
            if not 0 < len(tokens) <= self.room:
                raise ValueError(f"input {number} has {len(tokens)} tokens; it may have 1 to {self.room}")
            if outside := [token for token in tokens if not 0 <= token < vocabulary]:
                raise ValueError(f"input {number} has ids {outside[:5]} outside of the vocabulary of {vocabulary}")
        if not texts:
            raise ValueError("there are no inputs: give at least one text")
        request = _Request(texts, pooling, adapter, [], Future())
        with self._lock:
            if len(self._requests) >= self._queue:
                raise QueueFull(f"{len(self._requests)} requests for embeddings wait: try again later")
            self._requests.append(request)
        return request.future

    def turn(self) -> bool:
        """Reads at most one chunk, in the engine's thread; False if there was nothing to do."""
        request = self._first()
        if request is None:
            return False
        tokens = request.texts[len(request.vectors)]
        size = piece_length(len(tokens) - self._place, 1, self._chunk, self._capacity)
        self._state = self._read(request.adapter, tokens, self._place, size)
        self._place += size
        if self._place >= len(tokens):
            self._finish_text(request, self._state, len(tokens))
        return True

    def warm_up(self) -> Iterator[int]:
        """Compiles all programs -> `sizes`, each when its program is there."""
        for size in self.sizes:
            self._state = self._read(None, [0], 0, size)
            jax.block_until_ready(self._state)
            yield size

    @property
    def sizes(self) -> list[int]:
        """The lengths of chunks, each of which has a program."""
        lengths = range(1, self._chunk + 1)
        return sorted({piece_length(length, 1, self._chunk, self._capacity) for length in lengths})

    def fail(self, error: Exception) -> None:
        """Tells all that wait that nothing will come, for an engine that stops."""
        with self._lock:
            while self._requests:
                _settle(self._requests.popleft().future, error)
            self._place = 0

    def _first(self) -> _Request | None:
        """The request whose turn it is; those that were cancelled are dropped."""
        with self._lock:
            while self._requests and self._requests[0].future.cancelled():
                self._requests.popleft()
                self._place = 0
            return self._requests[0] if self._requests else None

    def _read(self, adapter: str | None, tokens: Sequence[int], place: int, size: int) -> _State:
        config, params = self._checkpoint.config, self._adapters.rows([adapter])
        if self._state is None:
            cache = KVCache.create(config, 1, self._capacity, own_cache_dtype(self._checkpoint), unset=True)
            zeros = np.zeros(config.hidden_size, np.float32)
            self._state = _State(cache, jnp.asarray(zeros), jnp.asarray(zeros.copy()))
        piece = np.zeros((1, size), np.int32)
        part = tokens[place : place + size]
        piece[0, : len(part)] = part
        return _read(config, params, self._state, jnp.asarray(piece), jnp.int32(place), jnp.int32(len(tokens)))

    def _finish_text(self, request: _Request, state: _State, length: int) -> None:
        vector = np.asarray(state.last) if request.pooling == "last" else np.asarray(state.total) / length
        norm = np.sqrt(np.square(vector, dtype=np.float64).sum())
        is_number = bool(np.isfinite(norm) and norm > 0)
        request.vectors.append((vector / norm).astype(np.float32))
        has_more = is_number and len(request.vectors) < len(request.texts)
        with self._lock:
            self._place = 0
            self._requests.remove(request)
            if has_more:
                self._requests.append(request)  # behind the others
        if not is_number:
            self._state = None  # attention may multiply by 0 what it does not look at
            number = len(request.vectors) - 1
            _settle(request.future, ValueError(f"input {number} gave hidden states that are no finite numbers"))
        elif not has_more:
            _settle(request.future, np.stack(request.vectors))


def _settle(future: Future[np.ndarray], result: np.ndarray | Exception) -> None:
    """Ends a future, unless it was cancelled meanwhile."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)

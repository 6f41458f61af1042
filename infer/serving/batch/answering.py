"""Jobs through the engine, as many at a time as it has slots: one that ends makes room for the next at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import jax.numpy as jnp

from phi3_jax.checkpoint import Checkpoint

from ...answer import Generation, Piece, joined
from ...engine import Options
from ...engine.buckets import own_cache_dtype, sizes_for
from ..engine import Engine, Job

Key = TypeVar("Key")
_MOMENT = 0.002  # seconds after which a thread looks again whether another one's turn has ended a job of its own


def room_for(
    checkpoint: Checkpoint, slots: int, lengths: Iterable[tuple[int, int]], cache_dtype: str | None = None
) -> int:
    """`EngineOptions.room` for jobs: as coarse as the memory allows, so that few programs are compiled.

    Args:
      lengths: of each job, the tokens of its prompt and the most of its answer.
    """
    most = min(checkpoint.config.max_position_embeddings, max(map(sum, lengths), default=1))
    dtype = own_cache_dtype(checkpoint) if cache_dtype is None else jnp.dtype(cache_dtype)
    return sizes_for(checkpoint, slots, most, Options(), dtype)[1]


class Shared:
    """An engine that several threads hand jobs to: whoever is free takes a turn, for all of them."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._turns = threading.Lock()
        self._free = threading.Semaphore(engine.options.slots)

    def take_slot(self, wait: bool) -> bool:
        """Takes a slot for a job, which has to be given back -> whether there was one, at once or after a moment."""
        self.require_running()
        return self._free.acquire(timeout=_MOMENT) if wait else self._free.acquire(blocking=False)

    def give_slot(self) -> None:
        """A job has ended."""
        self._free.release()

    def turn(self) -> bool:
        """Takes a turn, or waits a moment while another thread does -> whether there was anything to do."""
        if not self._turns.acquire(timeout=_MOMENT):
            return True
        try:
            self.require_running()
            return self.engine.turn()
        finally:
            self._turns.release()

    def require_running(self) -> None:
        """Raises RuntimeError if a turn has failed, whoever took it: what the engine says of its jobs is no answer."""
        if self.engine.has_stopped:
            raise RuntimeError("the engine has failed, and what was under way has no answer")


def answer_all(engine: Engine | Shared, jobs: Iterable[tuple[Key, Job]]) -> Iterator[tuple[Key, Generation]]:
    """Answers jobs -> their keys and answers, as they end: not in the order of the jobs.

    A job is handed over when the engine has a slot for it, so `Job.seconds` is the time that the answer itself takes.
    One that the engine refuses has an answer that says why. What is under way when the iterator is closed is cancelled.

    Args:
      engine: `Shared` if several threads do this with it.

    Raises:
      RuntimeError: the engine has failed.
    """
    ended: queue.SimpleQueue[_Answer[Key]] = queue.SimpleQueue()
    under_way: set[_Answer[Key]] = set()
    shared = engine if isinstance(engine, Shared) else Shared(engine)

    def next_ended() -> tuple[Key, Generation]:
        while ended.empty():
            shared.turn()
        shared.require_running()
        answer = ended.get()
        under_way.remove(answer)
        shared.give_slot()
        return answer.key, answer.whole()

    try:
        for key, job in jobs:
            while not shared.take_slot(wait=not under_way):
                if under_way:
                    yield next_ended()
            try:
                under_way.add(_Answer(key, shared.engine, job, ended))
            except BaseException as error:
                shared.give_slot()
                if not isinstance(error, ValueError):
                    raise
                yield key, Generation("", [], "error", error=str(error))
        while under_way:
            yield next_ended()
    finally:
        for answer in under_way:
            shared.engine.cancel(answer.ticket)
            shared.give_slot()


class _Answer(Generic[Key]):
    """A job that the engine has, and the pieces of its answer so far."""

    def __init__(self, key: Key, engine: Engine, job: Job, ended: queue.SimpleQueue[_Answer[Key]]):
        self.key, self._ended = key, ended
        self._pieces: list[Piece] = []
        self.ticket = engine.submit(job, self._take)

    def _take(self, piece: Piece) -> None:  # in the thread that takes the engine's turns
        self._pieces.append(piece)
        if piece.finish_reason is not None:
            self._ended.put(self)

    def whole(self) -> Generation:
        """The answer, once it has ended."""
        return joined(self._pieces, self.ticket.prompt_logprobs)

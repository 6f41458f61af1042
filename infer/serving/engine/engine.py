"""The engine: takes jobs from any thread, and carries them out in one, turn by turn.

A turn reads at most one piece of one prompt, and then writes some tokens of all answers in one call of the compiled
loop. So a long prompt delays the others by one piece at most, and jobs come and go between two calls.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import KVCache

from ...answer import FinishReason
from ...engine import NewTokens
from . import warm_up
from .adapters import Adapters
from .batch import Batch
from .jobs import Job, QueueFull, Ticket
from .options import MOST_STEPS, EngineOptions, Sizes
from .pooling import Pooler, Pooling
from .prefixes import Prefixes
from .reader import Reader
from .scheduler import Scheduler
from .sequence import Listener, Row
from .statistics import Statistics

_CALL_SECONDS = 0.05  # a call of the compiled loop takes about this long at most: so much later is a new job seen


class Engine:
    """Answers many jobs at once.

        engine = Engine(checkpoint)
        threading.Thread(target=engine.run).start()
        ticket = engine.submit(Job(ids, 32), print)

    Attributes:
      statistics: what it has done, and how much is under way.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ):
        """Sets the sizes of arrays; nothing is run yet.

        Args:
          adapters: LoRA adapters by the names that `Job.adapter` asks for: folders, or hub ids.

        Raises:
          FileNotFoundError, ValueError: an adapter cannot be read, or not be attached for rows: see `Adapters.load`.
        """
        self.options = options = options or EngineOptions()
        self._adapters = Adapters.load(checkpoint, adapters or {})
        self.checkpoint, self.sizes = checkpoint, Sizes.of(checkpoint, options)
        self.statistics = Statistics(slots=options.slots)
        self._begin_empty()
        self._pooler = Pooler(checkpoint, self._adapters, self.sizes.room, self.sizes.chunk, options.queue)
        self._reads_text = False  # the last piece that was read was one of a text to embed
        self._seconds_per_step: float | None = None
        # What other threads ask for; everything else belongs to the thread that takes turns.
        self._changed = threading.Condition()
        self._new: list[Row] = []
        self._cancelled: set[int] = set()
        self._taken = 0  # jobs that have not ended
        self._is_draining = self._is_stopped = False

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Takes a job, from any thread.

        Args:
          listener: called with each `Piece` of the answer, in the engine's thread, where it must not take long; the
            last one has the finish_reason. If it raises, the job is cancelled.

        Raises:
          ValueError: the job makes no sense, does not fit into the room, or its grammar cannot be used;
            there is no such adapter.
          QueueFull: too many jobs wait, or the engine is about to stop.
        """
        if job.logprobs is not None and not 0 <= job.logprobs <= self.options.top_logprobs:
            raise ValueError(f"logprobs={job.logprobs} must be at least 0 and at most {self.options.top_logprobs}")
        self._adapters.require(job.adapter)
        self._check_open()  # before the work of a grammar
        row = Row.of(job, listener, self.checkpoint, self.sizes)
        with self._changed:
            self._check_open()
            self._taken += 1
            self._new.append(row)
            self._changed.notify_all()
        return row.ticket

    @property
    def has_stopped(self) -> bool:
        """Whether nothing more is answered: after `stop`, or because a turn has failed, before any job is told so."""
        return self._is_stopped

    def _check_open(self) -> None:
        if self._is_draining or self._is_stopped:
            raise QueueFull("the server is about to stop")
        if self._taken >= self.options.slots + self.options.queue:
            raise QueueFull(f"{self.options.queue} requests wait already; try again later")

    def cancel(self, ticket: Ticket) -> None:
        """Ends a job as it is, before the next call of a compiled function; one that has ended is left alone."""
        with self._changed:
            self._cancelled.add(ticket.number)
            self._changed.notify_all()

    def submit_embedding(
        self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean", adapter: str | None = None
    ) -> Future[np.ndarray]:
        """Takes texts, as token ids, from any thread -> their vectors, once there was time: see `Pooler.submit`."""
        with self._changed:
            if self._is_draining or self._is_stopped:
                raise QueueFull("the server is about to stop")
            future = self._pooler.submit(texts, pooling, adapter)
            self._changed.notify_all()
        return future

    def run(self) -> None:
        """Takes turns until `stop`, or until `drain` has nothing left to do; sleeps while there is nothing to do.

        After `stop`, what is under way ends as it is ("interrupt"). An exception ends it with "error", and is raised.
        """
        while not self._is_stopped:
            if self.turn():
                continue
            with self._changed:
                is_idle = not self._new and not self._pooler.waiting
                if self._is_draining and is_idle:
                    return
                if is_idle and not self._cancelled and not self._is_stopped:
                    self._changed.wait()
        self._take_news()
        for row in list(self._rows.values()):
            self._end(row, "interrupt")
        self._pooler.fail(RuntimeError("the engine has stopped"))
        self._count()

    def drain(self) -> None:
        """Takes no more jobs; `run` returns when those that were taken have ended."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()

    def stop(self) -> None:
        """`run` returns after the turn that it is taking; what is under way ends as it is."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def warm_up(self, told: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Compiles the programs, by running each once; `told` hears how many of how many steps are done."""
        programs = warm_up.Programs(self.checkpoint, self.sizes, self.options, self._params)
        warm_up.run_all([lambda: list(self._pooler.warm_up()), *programs.together()], programs.then(), told)
        self.statistics.warmed_up()

    def turn(self) -> bool:
        """Takes one turn -> whether there was anything to do. An exception ends all jobs, and the engine."""
        try:
            return self._turn()
        except BaseException as error:
            self._fail(error)
            raise

    def _turn(self) -> bool:
        self._take_news()
        self._end_overdue()
        while (admitted := self._scheduler.admit(len({*self._readers.values()}))) is not None:
            self._start_reading(self._rows[admitted])
        number = None
        self._reads_text = bool(self._pooler.waiting) and not (self._reads_text and self._scheduler.reading)
        if self._reads_text:
            self._pooler.turn()
        elif (number := self._scheduler.next_to_read()) is not None:
            self._read(self._readers[number])
        is_writing = bool(self._scheduler.writing)
        if is_writing:
            self._write()
        self._count()
        return number is not None or self._reads_text or is_writing

    def _params(self, rows: Sequence[Row | None]) -> Any:
        """The weights for rows that run together."""
        return self._adapters.rows([None if row is None else row.job.adapter for row in rows])

    def _take_news(self) -> None:
        with self._changed:
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, set()
        for row in new:
            self._rows[row.ticket.number] = row
            self._scheduler.add(row.ticket.number)
        for number in cancelled & self._rows.keys():
            self._end(self._rows[number], "interrupt")

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for row in list(self._rows.values()):
            if row.ends_at is not None and now >= row.ends_at:
                self._end(row, "deadline")

    def _start_reading(self, row: Row) -> None:
        row.ticket.begun = row.ticket.begun or time.perf_counter()
        row.was_long = self._is_long(row)
        number = row.ticket.number
        for reader in self._readers.values():
            if reader.serves(row):
                reader.rows.append(row)
                self._readers[number] = reader
                return
        memory = self._memory.pop() if self._memory else None
        self._readers[number] = Reader(self.checkpoint, self.sizes, row, self._prefixes, memory)

    def _close(self, reader: Reader) -> None:
        """Nobody needs what a reader holds; memory that was in use is taken again sooner than new memory is there.

        But not memory with NaN: attention may multiply by 0 what it does not look at.
        """
        reader.close()
        if reader.is_clean and len(self._memory) < self.options.readers:
            self._memory.append(reader.cache)

    def _is_long(self, row: Row) -> bool:
        """Whether a row's next token needs LongRoPE's long factors."""
        return self.sizes.border is not None and len(row.tokens) > self.sizes.border

    def _read(self, reader: Reader) -> None:
        reader.read_piece(self._params(reader.rows[:1]))
        if not reader.is_over:
            return
        for row in reader.rows:
            del self._readers[row.ticket.number]
        for row in list(reader.rows):
            number = row.ticket.number
            self._tell(row, *reader.answer(self._params([row]), row))
            if number not in self._rows:
                continue
            if self._is_long(row) != row.was_long:
                self._start_reading(row)
            else:
                self._scheduler.has_read(number)
                self._batch.join(row, reader.cache, len(self._rows))
        self._close(reader)

    def _write(self) -> None:
        self._batch.shrink()
        steps, begin = self._steps(), time.perf_counter()
        results = self._batch.write(self._params(self._batch.rows), steps)
        if most := max(len(new.token_ids) for _, new, _ in results):
            # With guesses a step writes up to so many tokens: at least so many steps were taken.
            at_once = 1 + self.options.speculate if self._batch.way() == "guesses" else 1
            self._seconds_per_step = (time.perf_counter() - begin) / math.ceil(most / at_once)
        for row, new, is_done in results:
            self._tell(row, new, is_done)
        for row in self._batch.used:
            if self._is_long(row) != row.was_long:
                self._batch.leave(row)
                self._scheduler.must_read(row.ticket.number)
                self._start_reading(row)

    def _steps(self) -> int:
        """How many tokens the next call writes: one while something else waits for its turn."""
        if self._scheduler.reading or self._new or self._pooler.waiting or self._seconds_per_step is None:
            return 1
        return max(1, min(MOST_STEPS, int(_CALL_SECONDS / self._seconds_per_step)))

    def _tell(self, row: Row, new: NewTokens, is_done: bool) -> None:
        """Tells a row's listener of new tokens; a row that has ended leaves."""
        if not (new.token_ids or is_done or new.error):
            return
        row.tell(new, "length" if is_done else None)
        if row.answer.finish_reason is not None:
            self._remove(row)

    def _end(self, row: Row, reason: FinishReason) -> None:
        """Ends a row from outside."""
        _say_last(row, reason)
        self._remove(row)

    def _remove(self, row: Row) -> None:
        """Takes a row that has ended out of everything."""
        number = row.ticket.number
        self._scheduler.end(number)
        if (reader := self._readers.pop(number, None)) is not None:
            reader.rows.remove(row)
            if not reader.rows:
                self._close(reader)
        if row in self._batch.rows:
            self._batch.leave(row)
        del self._rows[number]
        self._forget(row)

    def _forget(self, row: Row) -> None:
        with self._changed:
            self._taken -= 1
        self.statistics.ended(row)

    def _fail(self, error: BaseException) -> None:
        """Ends all jobs, in whatever state things are, and takes no others."""
        with self._changed:
            self._is_stopped = True
            rows, self._new = [*self._rows.values(), *self._new], []
        self._begin_empty()
        for row in rows:
            if row.answer.finish_reason is None:
                _say_last(row, "error", f"the engine has stopped: {error!r}")
            self._forget(row)
        self._pooler.fail(RuntimeError(f"the engine has stopped: {error!r}"))
        self._count()

    def _begin_empty(self) -> None:
        """No jobs."""
        self._rows: dict[int, Row] = {}
        self._readers: dict[int, Reader] = {}  # several rows may share one
        self._memory: list[KVCache] = []  # of readers that are over
        self._scheduler = Scheduler(self.options.slots, self.options.queue, self.options.readers)
        self._batch = Batch(self.checkpoint, self.sizes, self.options)
        self._prefixes = Prefixes(self.sizes.chunk, self.sizes.prefix_bytes) if self.sizes.prefix_bytes else None

    def _count(self) -> None:
        scheduler, counts = self._scheduler, self.statistics
        counts.waiting, counts.reading = len(scheduler.waiting), len(scheduler.reading)
        counts.writing, counts.embedding = len(scheduler.writing), self._pooler.waiting
        counts.cache_used = sum(len(row.tokens) for row in self._batch.used) / (self.options.slots * self.sizes.room)
        if (known := self._prefixes) is not None:
            counts.prefix_hits, counts.prefix_misses = known.hits, known.misses
            counts.prefix_bytes, counts.prefix_chunks = known.bytes, len(known)
            counts.prefix_evictions = known.evictions
        counts.guessed, counts.guessed_right = self._batch.offered, self._batch.taken


def _say_last(row: Row, reason: FinishReason, error: str | None = None) -> None:
    """Tells the listener of a row that was ended from outside."""
    row.tell(NewTokens([], None if row.job.logprobs is None else [], error), reason)

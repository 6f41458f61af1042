"""The engine: takes jobs from any thread, and carries them out in one, turn by turn.

A turn reads at most one piece of one prompt, and then writes some tokens of all answers in one call of the compiled
loop. So a long prompt delays the others by one piece at most, and jobs come and go between two calls.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from phi3_jax.checkpoint import Checkpoint

from ...answer import FinishReason, NewTokens
from .batch import Batch
from .jobs import Job, QueueFull, Ticket
from .options import EngineOptions, Sizes
from .pooling import Pooler, Pooling
from .reader import Reader
from .scheduler import Scheduler
from .sequence import Listener, Row
from .statistics import Statistics

_MOST_STEPS = 32  # tokens of a row that `News` has room for
_CALL_SECONDS = 0.05  # a call of the compiled loop takes about this long at most: so much later is a new job seen


class Engine:
    """Answers many jobs at once.

        engine = Engine(checkpoint)
        threading.Thread(target=engine.run).start()
        ticket = engine.submit(Job(ids, 32), print)

    Attributes:
      statistics: what it has done, and how much is under way.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions | None = None):
        """Sets the sizes of arrays; nothing is run yet."""
        self.options = options = options or EngineOptions()
        self.checkpoint, self.sizes = checkpoint, Sizes.of(checkpoint, options)
        self.statistics = Statistics(slots=options.slots)
        self._scheduler = Scheduler(options.slots, options.queue, options.readers)
        self._batch = Batch(checkpoint, self.sizes, options.top_logprobs)
        self._pooler = Pooler(checkpoint, self.sizes.room, self.sizes.chunk, options.queue)
        self._reads_text = False  # the last piece that was read was one of a text to embed
        self._rows: dict[int, Row] = {}
        self._readers: dict[int, Reader] = {}
        self._seconds_per_step: float | None = None
        # What other threads ask for; everything else belongs to the thread that takes turns.
        self._changed = threading.Condition()
        self._new: list[Row] = []
        self._cancelled: set[int] = set()
        self._is_draining = self._is_stopped = False

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Takes a job, from any thread.

        Args:
          listener: called with each `Piece` of the answer, in the engine's thread, where it must not take long; the
            last one has the finish_reason. If it raises, the job is cancelled.

        Raises:
          ValueError: the job makes no sense, does not fit into the room, or its grammar cannot be used.
          QueueFull: too many jobs wait, or the engine is about to stop.
        """
        if job.logprobs is not None and not 0 <= job.logprobs <= self.options.top_logprobs:
            raise ValueError(f"logprobs={job.logprobs} must be at least 0 and at most {self.options.top_logprobs}")
        if job.adapter is not None:
            raise ValueError(f"there is no adapter {job.adapter!r}")
        row = Row.of(job, listener, self.checkpoint, self.sizes.room)
        with self._changed:
            if self._is_draining or self._is_stopped:
                raise QueueFull("the server is about to stop")
            if len(self._new) + self.statistics.waiting >= self.options.queue + self._free():
                raise QueueFull(f"{self.statistics.waiting} requests wait already; try again later")
            self._new.append(row)
            self._changed.notify_all()
        return row.ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a job as it is, before the next call of a compiled function; one that has ended is left alone."""
        with self._changed:
            self._cancelled.add(ticket.number)
            self._changed.notify_all()

    def submit_embedding(self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean") -> Future[np.ndarray]:
        """Takes texts, as token ids, from any thread -> their vectors, once there was time: see `Pooler.submit`."""
        with self._changed:
            if self._is_draining or self._is_stopped:
                raise QueueFull("the server is about to stop")
            future = self._pooler.submit(texts, pooling)
            self._changed.notify_all()
        return future

    def run(self) -> None:
        """Takes turns until `stop`, or until `drain` has nothing left to do; sleeps while there is nothing to do."""
        try:
            while not self._is_stopped:
                if self.turn():
                    continue
                with self._changed:
                    is_idle = not self._new and not self._pooler.waiting
                    if self._is_draining and is_idle:
                        return
                    if is_idle and not self._cancelled and not self._is_stopped:
                        self._changed.wait()
        finally:
            self._pooler.fail(RuntimeError("the engine has stopped"))

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
        """Compiles the programs, by running small jobs; `told` hears how many of how many steps are done."""
        sizes, done = [*self.sizes.rungs], 0
        of = 2 * len(sizes) + len(self._pooler.sizes)
        prompt = [self.checkpoint.generation.eos_token_ids[0]] * min(self.sizes.chunk, self.sizes.room - 2)
        for logprobs in (None, 0):
            for rows in sizes:
                for _ in range(min(rows, self.options.slots)):
                    self.submit(Job(prompt, 2, logprobs=logprobs), lambda piece: None)
                while self.turn():
                    pass
                done += 1
                told(done, of)
        for number, _ in enumerate(self._pooler.warm_up(), 1):
            told(done + number, of)

    def turn(self) -> bool:
        """Takes one turn -> whether there was anything to do."""
        self._take_news()
        self._end_overdue()
        for number in self._scheduler.admit():
            self._start_reading(self._rows[number])
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

    def _take_news(self) -> None:
        with self._changed:
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, set()
            for row in new:
                self._rows[row.ticket.number] = row
                self._scheduler.add(row.ticket.number)
            self._count()
        for number in cancelled & self._rows.keys():
            self._end(self._rows[number], "interrupt")

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for row in list(self._rows.values()):
            if row.ends_at is not None and now >= row.ends_at:
                self._end(row, "deadline")

    def _start_reading(self, row: Row) -> None:
        row.ticket.begun = row.ticket.begun or time.perf_counter()
        config = self.checkpoint.config
        border = None if config.long_rope is None else config.long_rope.original_max_position_embeddings
        row.was_long = border is not None and len(row.tokens) > border
        self._readers[row.ticket.number] = Reader(self.checkpoint, self.sizes, row, self.options.top_logprobs)

    def _read(self, reader: Reader) -> None:
        row, number = reader.row, reader.row.ticket.number
        reader.read_piece(self.checkpoint.params)
        if not reader.is_over:
            return
        news = reader.answer(self.checkpoint.params)
        del self._readers[number]
        record, begin, ids = reader.state.logprobs, len(row.tokens), news.tokens[0, : news.counts[0]].tolist()
        if row.job.echo and row.ticket.prompt_logprobs is None and record is not None:
            row.ticket.prompt_logprobs = record.read(0, list(row.job.prompt), 0)
        logprobs = None if record is None else record.read(0, ids, begin)
        error = row.add(ids, int(news.failed[0]))
        self._scheduler.has_read(number)
        self._tell(row, NewTokens(ids, logprobs, error), bool(news.done[0]))
        if number in self._rows:
            self._batch.join(row, reader.state.cache)

    def _write(self) -> None:
        steps, begin = self._steps(), time.perf_counter()
        results = self._batch.write(self.checkpoint.params, steps)
        most = max(len(ids) for _, ids, _, _ in results)
        if most:
            self._seconds_per_step = (time.perf_counter() - begin) / most
        told = []
        for row, ids, flag, is_done in results:
            error = row.add(ids, flag)
            told.append((row, NewTokens(ids, self._batch.logprobs(row, ids), error), is_done))
        for row, new, is_done in told:
            self._tell(row, new, is_done)
        config = self.checkpoint.config
        if config.long_rope is not None:
            border = config.long_rope.original_max_position_embeddings
            for row, _, _ in told:
                if row.ticket.number in self._rows and not row.was_long and len(row.tokens) > border:
                    self._batch.leave(row)
                    self._scheduler.must_read(row.ticket.number)
                    self._start_reading(row)

    def _steps(self) -> int:
        """How many tokens the next call writes: one while something else waits for its turn."""
        if self._scheduler.reading or self._new or self._pooler.waiting or self._seconds_per_step is None:
            return 1
        return max(1, min(_MOST_STEPS, int(_CALL_SECONDS / self._seconds_per_step)))

    def _tell(self, row: Row, new: NewTokens, is_done: bool) -> None:
        """Tells a row's listener of new tokens; a row that has ended leaves."""
        try:
            if new.token_ids or is_done or new.error:
                row.tell(new, is_done)
        except Exception:  # the listener is gone, and nobody else can be told
            row.answer.finish_reason = "interrupt"
        if row.answer.finish_reason is not None:
            self._remove(row)

    def _end(self, row: Row, reason: FinishReason) -> None:
        """Ends a row from outside."""
        try:
            row.listener(row.answer.add(NewTokens([], [] if row.job.logprobs is not None else None), reason))
        except Exception:  # as in `_tell`
            row.answer.finish_reason = reason
        self._remove(row)

    def _remove(self, row: Row) -> None:
        number = row.ticket.number
        self._scheduler.end(number)
        self._readers.pop(number, None)
        if row in self._batch.rows:
            self._batch.leave(row)
        del self._rows[number]
        self.statistics.ended(row)

    def _free(self) -> int:
        counts = self.statistics
        return self.options.slots - counts.reading - counts.writing

    def _count(self) -> None:
        scheduler, counts = self._scheduler, self.statistics
        counts.waiting, counts.reading = len(scheduler.waiting), len(scheduler.reading)
        counts.writing, counts.embedding = len(scheduler.writing), self._pooler.waiting
        used = sum(len(row.tokens) for row in self._batch.rows if row is not None)
        counts.cache_used = used / (self.options.slots * self.sizes.room)

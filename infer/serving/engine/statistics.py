"""What an engine has done and is doing, in plain numbers that any thread may read."""

from __future__ import annotations

import dataclasses

import jax

from .sequence import Row

_COMPILED = "/jax/core/compile/backend_compile_duration"
_counted = [0]


@dataclasses.dataclass
class Statistics:
    """Counts of jobs.

    Attributes:
      slots: how many jobs are read or write at a time.
      waiting, reading, writing: how many jobs are where.
      embedding: how many requests for embeddings wait or are being read.
      cache_used: of the memory for the keys and values of answers, the part that is in use.
      prompt_tokens, answer_tokens, reused_tokens: of the jobs that have ended: those of their prompts, those that were
        written, and those of their prompts that the prefix cache had.
      finished: how many jobs have ended, by their finish_reason.
      prefix_hits, prefix_misses: texts of which the prefix cache had a beginning, and of which it might have had one.
      prefix_bytes, prefix_chunks, prefix_evictions: what it holds, and how many chunks it had to evict.
      guessed, guessed_right: tokens of speculation, of rows that have left.
      compiled_before: programs that this process had compiled when the engine was made, or warmed up.
    """

    slots: int
    waiting: int = 0
    reading: int = 0
    writing: int = 0
    embedding: int = 0
    cache_used: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    reused_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_bytes: int = 0
    prefix_chunks: int = 0
    prefix_evictions: int = 0
    guessed: int = 0
    guessed_right: int = 0
    compiled_before: int = dataclasses.field(default_factory=lambda: _counted[0])

    @property
    def compiled(self) -> int:
        """How many programs this process has compiled, or loaded from the compilation cache, since the warm-up."""
        return _counted[0] - self.compiled_before

    def warmed_up(self) -> None:
        """What was compiled until now does not count."""
        self.compiled_before = _counted[0]

    def ended(self, row: Row) -> None:
        """Counts a job that has ended."""
        self.prompt_tokens += len(row.job.prompt)
        self.answer_tokens += row.written
        self.reused_tokens += row.ticket.reused
        reason = str(row.answer.finish_reason)
        self.finished[reason] = self.finished.get(reason, 0) + 1


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
        _counted[0] += 1


jax.monitoring.register_event_duration_secs_listener(_note)

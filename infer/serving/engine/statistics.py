"""What an engine has done and is doing, in plain numbers that any thread may read."""

from __future__ import annotations

import dataclasses

from .sequence import Row


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

    def ended(self, row: Row) -> None:
        """Counts a job that has ended."""
        prompt = len(row.job.prompt)
        self.prompt_tokens += prompt
        self.answer_tokens += len(row.tokens) - prompt
        self.reused_tokens += row.ticket.reused
        reason = str(row.answer.finish_reason)
        self.finished[reason] = self.finished.get(reason, 0) + 1

"""A job while it is carried out, as the host knows it."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable

import numpy as np

from phi3_jax.checkpoint import Checkpoint

from ...answer import Answer, FinishReason, Piece
from ...engine import NewTokens
from ...engine.failures import NO_TOKEN, NOT_FINITE, explain
from ...sampling import Sampling
from ...sampling.grammar import GrammarMasks
from ...sampling.logprobs import TokenLogprob
from .jobs import Job, Ticket
from .options import Sizes

Listener = Callable[[Piece], None]


@dataclasses.dataclass(eq=False)
class Row:
    """A job that is being carried out.

    Attributes:
      tokens: the prompt and the answer so far.
      limit: the most new tokens.
      answer: makes text of them.
      masks: of the job's grammar.
      ends_at: when its time is over, by `time.monotonic`.
      was_long: whether its keys were made with LongRoPE's long factors.
      grammar_error: what the grammar says of a dead end.
      written: how many tokens the listener was told.
      is_spoiled: its keys and values may be NaN.
    """

    job: Job
    ticket: Ticket
    listener: Listener
    tokens: list[int]
    limit: int
    answer: Answer
    masks: GrammarMasks | None
    ends_at: float | None
    was_long: bool = False
    grammar_error: str | None = None
    written: int = 0
    is_spoiled: bool = False

    @classmethod
    def of(cls, job: Job, listener: Listener, checkpoint: Checkpoint, sizes: Sizes) -> Row:
        """Checks a job. Raises ValueError for one that cannot be carried out."""
        room, config, prompt = sizes.room, checkpoint.config, [operator.index(token) for token in job.prompt]
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if outside := [token for token in prompt if not 0 <= token < config.vocab_size][:5]:
            raise ValueError(f"the prompt has token ids {outside} outside of the vocabulary of {config.vocab_size}")
        if job.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={job.max_new_tokens} must be at least 0")
        if len(prompt) >= room:
            raise ValueError(f"the prompt has {len(prompt)} tokens, and with its answer at most {room} have room")
        if job.echo and job.logprobs is None:
            raise ValueError("echo records log-probabilities: give logprobs, too, for instance logprobs=0")
        if job.seconds is not None and not job.seconds >= 0:
            raise ValueError(f"seconds={job.seconds} must be a number of at least 0")
        _check_lists(job.sampling, config.vocab_size, sizes)
        masks = None
        if job.grammar is not None:
            if checkpoint.tokenizer is None:
                raise ValueError("a grammar needs a tokenizer: put tokenizer.json or tokenizer.model into the folder")
            ends = checkpoint.generation.eos_token_ids
            masks = GrammarMasks(checkpoint.tokenizer, [job.grammar], ends, config.vocab_size)
        ticket = Ticket()
        answer = Answer(checkpoint, ticket.number, tuple(job.stop), job.markers)
        ends_at = None if job.seconds is None else time.monotonic() + job.seconds
        limit = min(job.max_new_tokens, room - len(prompt))
        return cls(job, ticket, listener, prompt, limit, answer, masks, ends_at)

    def allowed(self, words: int) -> np.ndarray:
        """The grammar's mask, uint32 [words]: all of it set without a grammar, none of it at a dead end."""
        if self.masks is None:
            return np.full(words, 0xFFFFFFFF, np.uint32)
        try:
            return self.masks.mask(0)
        except ValueError as error:
            self.grammar_error = str(error)
            return np.zeros(words, np.uint32)

    def add(self, token_ids: list[int], logprobs: list[TokenLogprob] | None, flag: int) -> NewTokens:
        """Adds tokens that a call has written.

        Args:
          logprobs: of them, as the engine records them: cut to what the job asks for.
          flag: of failures.py: why the row cannot go on; 0: it can.
        """
        self.tokens += token_ids
        self.is_spoiled = flag == NOT_FINITE
        error = None
        if flag:
            own = self.grammar_error if flag == NO_TOKEN else None
            error = own or explain(flag, len(self.tokens) - len(self.job.prompt))
        if self.masks is not None:
            try:
                for token in token_ids:
                    self.masks.push(0, token)
            except ValueError as gave_up:  # ends this row, not the engine
                error = error or str(gave_up)
        return NewTokens(token_ids, None if logprobs is None else self.cut(logprobs), error)

    def cut(self, logprobs: list[TokenLogprob]) -> list[TokenLogprob] | None:
        """Recorded log-probabilities with as many likely tokens as the job asks for; None if it asks for none."""
        if (most := self.job.logprobs) is None:
            return None
        return [dataclasses.replace(each, top=dict(list(each.top.items())[:most])) for each in logprobs]

    def tell(self, new: NewTokens, ended: FinishReason | None) -> None:
        """Tells the listener of new tokens, and why the answer ends with them, if it does: see `Answer.add`.

        What goes wrong here ends this row alone.
        """
        try:
            piece = self.answer.add(new, ended)
        except Exception as error:  # ids that are no text, for instance
            self.answer.finish_reason = "error"
            piece = Piece(self.ticket.number, "", [], None if new.logprobs is None else [], "error", str(error))
        self.written += len(piece.token_ids)
        try:
            self.listener(piece)
        except Exception:  # the listener is gone, and nobody else can be told
            self.answer.finish_reason = self.answer.finish_reason or "interrupt"


def _check_lists(sampling: Sampling, vocab_size: int, sizes: Sizes) -> None:
    """Raises ValueError for token ids that are not in the vocabulary, and for lists that are too long."""
    biases, listed = sizes.most_biases, sizes.most_listed
    for name, most in (("logit_bias", biases), ("banned_tokens", listed), ("forced_tokens", listed)):
        ids = list(getattr(sampling, name))
        if outside := [token for token in ids if token >= vocab_size][:5]:
            raise ValueError(f"{name} names tokens {outside} outside of the vocabulary of {vocab_size}")
        if len(ids) > most:
            raise ValueError(f"{name} has {len(ids)} entries, and the engine has room for {most}: give fewer")

"""A job while it is carried out, as the host knows it, and the settings of several of them for the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint

from ...answer import Answer, NewTokens, Piece
from ...engine.decoding import Settings
from ...engine.failures import NO_TOKEN, explain
from ...sampling import Sampling, SamplingArrays
from ...sampling.grammar import GrammarMasks
from .jobs import Job, Ticket

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

    @classmethod
    def of(cls, job: Job, listener: Listener, checkpoint: Checkpoint, room: int) -> Row:
        """Checks a job. Raises ValueError for one that cannot be carried out."""
        config, prompt = checkpoint.config, list(job.prompt)
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
        SamplingArrays.of([job.sampling], config.vocab_size)  # names tokens outside of the vocabulary
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

    def add(self, token_ids: list[int], flag: int) -> str | None:
        """Adds new tokens -> why the row cannot go on, by a flag of failures.py (0: it can)."""
        self.tokens += token_ids
        if self.masks is not None:
            for token in token_ids:
                self.masks.push(0, token)
        if not flag:
            return None
        own = self.grammar_error if flag == NO_TOKEN else None
        return own or explain(flag, len(self.tokens) - len(self.job.prompt))

    def tell(self, new: NewTokens, ended: bool) -> None:
        """Makes a piece of the answer of new tokens, and tells the listener."""
        if self.job.logprobs is not None and new.logprobs is not None:
            most = self.job.logprobs
            cut = [dataclasses.replace(each, top=dict(list(each.top.items())[:most])) for each in new.logprobs]
            new = dataclasses.replace(new, logprobs=cut)
        elif new.logprobs is not None:
            new = dataclasses.replace(new, logprobs=None)
        self.listener(self.answer.add(new, "length" if ended else None))


def settings_of(rows: Sequence[Row | None], checkpoint: Checkpoint) -> Settings:
    """The settings of rows for the device; None is a row that is not used."""
    nothing = Sampling()
    return Settings(
        limits=jnp.asarray([0 if row is None else row.limit for row in rows], jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        sampling=SamplingArrays.of(
            [nothing if row is None else row.job.sampling for row in rows], checkpoint.config.vocab_size
        ).for_any(),
        prompt_lengths=jnp.asarray([0 if row is None else len(row.job.prompt) for row in rows], jnp.int32),
    )

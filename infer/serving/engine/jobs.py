"""What the engine is asked for, and how it says that it cannot take more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from ...sampling import Grammar, Sampling, TokenLogprob

_numbers = itertools.count()


class QueueFull(Exception):
    """So many jobs wait that no other is taken; trying again later may succeed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One answer to be written.

    Attributes:
      prompt: token ids.
      max_new_tokens: the most tokens of the answer; what the engine has room for is a limit, too.
      sampling: how its tokens are picked; the same seed gives the same answer, whatever else is running.
      stop: strings that end the answer.
      grammar: what the answer must match.
      logprobs: record the log-probabilities of its tokens, and of this many most likely ones in their place.
      echo: record those of the prompt's tokens, too.
      adapter: the name of a LoRA adapter of the engine; None for the model itself.
      seconds: after so many from its submission on, the answer ends as it is.
      markers: special tokens that mark calls of tools are written out in the text (`Answer`).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: Sequence[str] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    echo: bool = False
    adapter: str | None = None
    seconds: float | None = None
    markers: bool = False


@dataclasses.dataclass(eq=False)
class Ticket:
    """A job that was taken.

    Attributes:
      number: of its place in the queue, rising.
      reused: how many tokens of the prompt were found in the prefix cache.
      prompt_logprobs: of the prompt's tokens, with `Job.echo`, from the first piece on.
      begun: when its reading began, by `time.perf_counter`; None before.
    """

    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    reused: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    begun: float | None = None

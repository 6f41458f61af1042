"""How a run is carried out, beside what is picked (sampling/params.py): one object for all rows."""

from __future__ import annotations

import dataclasses
import typing

from .decoding import RopePolicy
from .prompt_cache import PromptCache
from .speculation import DraftModel, PromptLookup

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is carried out. Raises ValueError for values that make no sense.

    Attributes:
      prefill_chunk: how many tokens of the prompts are read at a time, which bounds the memory that reading takes.
      cache_dtype: of the keys and values, one of CACHE_DTYPES; by default the weights' own, on the CPU float32.
      rope_policy: by what LongRoPE picks a row's factors. "length": by the row's own tokens, exact at every step; a row
        that grows past the border is read again, once, which costs a prefill of the batch. "capacity": by the tokens
        that it may grow to (prompt and max_new_tokens): no second reading, but a short text is then treated as a long
        one if its limit is large. "batch": by the longest row, as transformers does, for comparisons: a row then
        depends on its neighbours.
      logprobs: record each new token's log-probability and those of this many most likely tokens (0: only its own);
        None records nothing.
      echo: record the prompts' tokens, too; reading then takes B x prefill_chunk x V floats more.
      deadline: seconds after which answers end as they are; looked at between the calls of the compiled loop.
      speculation: guess several tokens at a time, which changes no token: `PromptLookup()` or `DraftModel(...)`.
      prompt_cache: the keys and values of a beginning that the prompts share. What a prompt has in common with it
        is not read again.
      room: the least number of tokens, prompt and answer together, that memory is made for. Runs with the same room
        share their compiled programs.
    """

    prefill_chunk: int = 512
    cache_dtype: str | None = None
    rope_policy: RopePolicy = "length"
    logprobs: int | None = None
    echo: bool = False
    deadline: float | None = None
    speculation: PromptLookup | DraftModel | None = None
    prompt_cache: PromptCache | None = None
    room: int = 0

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk} must be at least 1")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={self.cache_dtype!r} is not one of {CACHE_DTYPES}")
        if self.rope_policy not in typing.get_args(RopePolicy):
            raise ValueError(f"rope_policy={self.rope_policy!r} is not one of {typing.get_args(RopePolicy)}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} must be at least 0, or None")
        if self.echo and self.logprobs is None:
            raise ValueError(
                "echo records log-probabilities of the prompt: give logprobs, too, for instance logprobs=0"
            )
        if self.echo and self.prompt_cache is not None:
            raise ValueError("echo needs the whole prompt to be read: leave prompt_cache out")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline={self.deadline} must be a number of seconds above 0")
        if self.room < 0:
            raise ValueError(f"room={self.room} must be at least 0")
        if self.speculation is not None and self.rope_policy == "batch":
            raise ValueError(
                "rope_policy='batch' depends on the neighbours' lengths, which guessing changes: leave one out"
            )

    @property
    def guesses(self) -> int:
        """How many tokens are guessed at a time."""
        return 0 if self.speculation is None else self.speculation.guesses

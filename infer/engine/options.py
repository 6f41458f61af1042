"""How a run is carried out, one object for all rows; how tokens are picked is in sampling/params.py."""

from __future__ import annotations

import dataclasses
import typing

from phi3_jax.model.points import POINTS, Edit

from .prompt_cache import PromptCache
from .speculation import DraftModel, PromptLookup
from .state import RopePolicy

MOST_TOKENS = 1 << 20  # of a chunk or of room: beyond every context of these models
MOST_ROWS = 1 << 16
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is carried out. Raises ValueError for values that make no sense.

    Attributes:
      prefill_chunk: how many tokens of the prompts are read at a time, which bounds the memory that reading takes.
      cache_dtype: of the keys and values, one of CACHE_DTYPES; by default that of `prompt_cache`, if there is one, else
        `buckets.own_cache_dtype`.
      rope_policy: which number of tokens decides between LongRoPE's short and long factors. "length": the row's own,
        exact at every step; a row that grows past the border is read again, once, which costs a prefill of the batch.
        "capacity": the number that it may grow to (prompt and max_new_tokens): nothing is read again, but a short text
        gets the long factors if its limit is large. "batch": that of the longest row, as in transformers, for
        comparisons: a row then depends on the other rows.
      logprobs: record each new token's log-probability and those of this many most likely tokens (0: only its own);
        None records nothing.
      echo: record the prompts' tokens, too; prefill then needs memory for B x prefill_chunk x V more floats.
      deadline: seconds after which answers end as they are; checked after each chunk of the prompts, and at least each
        twentieth of a second (or step, if that is longer) while answers are written.
      speculation: guess several tokens at a time, which changes no token: `PromptLookup()` or `DraftModel(...)`.
      prompt_cache: the keys and values of a prefix; the part of it that all prompts begin with is not read again.
      room: make memory for at least this many tokens, prompt and answer together. Runs whose memory is rounded to the
        same room (buckets.py) share their compiled programs.
      edits: changes of values inside of the model (phi3_jax.inspection), in force while prompts are read and answers
        written, for all rows: steering, for instance. Positions are those of prompt and answer together. A function
        must treat each token by itself: it gets those of one call, a chunk of the prompt, or a token and guesses.
      rows: run at least so many rows, prompts that are not there included, so that batches that are not full share the
        programs of those that are.
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
    rows: int = 0
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.prefill_chunk <= MOST_TOKENS:
            raise ValueError(f"prefill_chunk={self.prefill_chunk} must be at least 1 and at most {MOST_TOKENS}")
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
        if not 0 <= self.room <= MOST_TOKENS:
            raise ValueError(f"room={self.room} must be at least 0 and at most {MOST_TOKENS}")
        if not 0 <= self.rows <= MOST_ROWS:
            raise ValueError(f"rows={self.rows} must be at least 0 and at most {MOST_ROWS}")
        check_edits(self.edits)
        if self.speculation is not None and self.rope_policy == "batch":
            raise ValueError(
                "rope_policy='batch' depends on the neighbours' lengths, which guessing changes: leave one out"
            )

    @property
    def guesses(self) -> int:
        """How many tokens are guessed at a time."""
        return 0 if self.speculation is None else self.speculation.guesses


def check_edits(edits: tuple[Edit, ...]) -> None:
    """Raises ValueError for changes that are not the same for every row, or whose shape is that of one call's tokens.

    Prompts are read chunk by chunk, answers written token by token, and keys lie in the slots of a cache.
    """
    for edit in edits:
        axes = "L" + POINTS[edit.point]
        if edit.positions is not None and edit.positions.ndim != 1:
            raise ValueError(f"an edit of {edit.point} has positions for each row: give one list for all of them")
        for array in (edit.factor, edit.value):
            sizes = dict(zip(axes, array.shape, strict=False)) if array.ndim else {}
            fixed = "BS" if edit.positions is not None else "BTS"
            if odd := [axis for axis in fixed if sizes.get(axis, 1) > 1]:
                raise ValueError(
                    f"an edit of {edit.point} has numbers {list(array.shape)} for {axes}: while generating, {odd[0]} "
                    "must be 1" + (", or the edit must name the positions" if odd[0] == "T" else "")
                )

"""Text in, text out: prompts are tokenised, run through the compiled functions of decoding.py, and decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from phi3_jax.checkpoint import Checkpoint

from .sampling import Sampling
from .stopping import StopWatch
from .stream import PREFILL_CHUNK, stream

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the decoded new tokens, without special tokens, up to the stop string if there was one.
      token_ids: the new tokens; an end token, or the token that completed a stop string, is the last of them.
      finish_reason: "stop" for an end token or a stop string, "length" for a limit reached (max_new_tokens, or the
        model's context).
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


def generate(
    checkpoint: Checkpoint,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Sequence[str] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    cache_dtype: str | None = None,
) -> list[Generation]:
    """Continues prompts.

    Args:
      prompts: text or token ids, one or several; several run as one batch. Text is not parsed for special tokens; for a
        chat pass the ids of `phi3_jax.encode_chat`.
      max_new_tokens: the most tokens of each answer.
      temperature: 0 for the most likely token at each step, else the softmax temperature to draw with.
      seed: of the random draws: row i draws with seed + i. The same seed gives the same answers.
      sampling: in place of temperature and seed: everything about how tokens are picked, for all rows or for each.
      stop: strings that end an answer.
      prefill_chunk: how many tokens of the prompts are read at a time, which bounds the memory that reading takes.
      cache_dtype: "float32", "bfloat16", "float16" or "int8" for the keys and values; by default the weights' own, on
        the CPU float32.

    Returns:
      one `Generation` for each prompt, in order.

    Raises:
      ValueError: a prompt is empty, has ids outside of the vocabulary, or fills the model's context; text was given but
        the checkpoint has no tokenizer; a number makes no sense.
    """
    ids = [encode_prompt(checkpoint, prompt) for prompt in _as_list(prompts)]
    answers = [Answer(checkpoint, stop) for _ in ids]
    steps = stream(
        checkpoint,
        ids,
        max_new_tokens,
        sampling=sampling_of_rows(len(ids), temperature, seed, sampling),
        prefill_chunk=prefill_chunk,
        cache_dtype=cache_dtype,
        is_over=lambda row: answers[row].stopped,
    )
    for new in steps:
        for answer, tokens in zip(answers, new, strict=True):
            answer.add(tokens)
    return [answer.finish() for answer in answers]


class Answer:
    """One answer while it grows."""

    def __init__(self, checkpoint: Checkpoint, stop: Sequence[str] = ()):
        if stop and checkpoint.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: put tokenizer.json or tokenizer.model into the folder")
        self._ends = checkpoint.generation.eos_token_ids
        self._decoder = checkpoint.tokenizer.stream(skip_special_tokens=True) if checkpoint.tokenizer else None
        self._watch = StopWatch(stop)
        self._text = ""
        self.token_ids: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._watch.stopped

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens, up to a stop string; returns the text that they make certain."""
        begin = len(self._text)
        for token in tokens:
            if self.stopped:
                break
            self.token_ids.append(token)
            self._text += self._watch.push(self._decoder.push(token)) if self._decoder else ""
        return self._text[begin:]

    def finish(self) -> Generation:
        """The whole answer, with what was held back of its text."""
        self._text += self._watch.push(self._decoder.flush()) if self._decoder else ""
        self._text += self._watch.flush()
        ended = self.stopped or (bool(self.token_ids) and self.token_ids[-1] in self._ends)
        return Generation(self._text, self.token_ids, "stop" if ended else "length")


def sampling_of_rows(
    rows: int, temperature: float, seed: int, sampling: Sampling | Sequence[Sampling] | None
) -> list[Sampling]:
    """What each row picks by. Raises ValueError if it is said twice, or not for every row."""
    if sampling is None:
        return [Sampling(temperature=temperature, seed=(seed + row) % 2**32) for row in range(rows)]
    if temperature != 0 or seed != 0:
        raise ValueError("give temperature and seed inside of sampling, not beside it")
    if isinstance(sampling, Sampling):
        seeds = [(sampling.seed + row) % 2**32 for row in range(rows)]
        return [dataclasses.replace(sampling, seed=row_seed) for row_seed in seeds]
    if len(sampling) != rows:
        raise ValueError(f"{len(sampling)} samplings for {rows} prompts")
    return list(sampling)


def encode_prompt(checkpoint: Checkpoint, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids pass through. Raises ValueError if there is text but no tokenizer."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if checkpoint.tokenizer is None:
        raise ValueError(
            "the checkpoint has no tokenizer: put tokenizer.json or tokenizer.model into its folder, or pass token ids"
        )
    return checkpoint.tokenizer.encode(prompt)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int | np.integer) else items

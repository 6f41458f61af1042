"""Text in, text out: prompts are tokenised, run through the compiled functions of engine/decoding.py, and decoded.

`stream` yields the answers piece by piece; `generate` waits for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from phi3_jax.checkpoint import Checkpoint

from .answer import Answer, Generation, Piece, write_answers
from .engine import Options, Run
from .prompts import Prompt, as_list, encode_prompt, for_each
from .sampling import Grammar, Sampling, stop_strings, watched_tokens

# Steps per call of the compiled loop if tokens are not needed one by one. It returns earlier after a token that may
# complete a stop string, so that no step is taken in vain.
_STEPS = 32


def generate(
    checkpoint: Checkpoint,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 32,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: str | Iterable[str] = (),
    grammar: Grammar | Sequence[Grammar | None] | None = None,
    options: Options | None = None,
    on_piece: Callable[[Piece], None] | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> list[Generation]:
    """Continues prompts.

    Args:
      prompts: text or token ids, one or several; several run as one batch. Text is not parsed for special tokens; for a
        chat pass the ids of `phi3_jax.encode_chat`.
      max_new_tokens: the most tokens of each answer, one number or one for each prompt.
      temperature: 0 for the most likely token at each step, else the softmax temperature to draw with.
      seed: of the random draws: row i draws with seed + i. The same seed gives the same answers.
      sampling: replaces temperature and seed: all settings of how tokens are picked, one for all rows or one for each.
      stop: a string that ends an answer, or several.
      grammar: what the answers must match, one for all rows or one for each.
      options: how the run is carried out: memory, LongRoPE, log-probabilities, deadline, speculation, prompt cache.
      on_piece: called with every piece of an answer as it comes.
      interrupt: called after each piece of the prompts is read, and then at least each quarter of a second, or step;
        True ends all answers as they are.

    Returns:
      one `Generation` for each prompt, in order. A row that cannot go on ends with finish_reason "error" and says why
      in `error`: the model's logits are no finite numbers, or no token may be picked. The others go on.

    Raises:
      ValueError: a prompt is empty, has ids outside of the vocabulary, or fills the model's context; text was given but
        the checkpoint has no tokenizer; a number makes no sense.
      ImportError: a grammar was given, but the extra `grammar` is not installed.
    """
    steps = 1 if on_piece else _STEPS
    batch = _Batch(checkpoint, prompts, max_new_tokens, temperature, seed, sampling, stop, grammar, options, steps)
    for piece in batch.pieces(interrupt):
        if on_piece is not None:
            on_piece(piece)
    return batch.finish()


def stream(
    checkpoint: Checkpoint,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 32,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: str | Iterable[str] = (),
    grammar: Grammar | Sequence[Grammar | None] | None = None,
    options: Options | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> Iterator[Piece]:
    """Like `generate`, but yields the answers piece by piece while they are generated.

    The pieces of a row, joined, are its `Generation`; the last one has the finish_reason.
    """
    batch = _Batch(checkpoint, prompts, max_new_tokens, temperature, seed, sampling, stop, grammar, options, steps=1)
    yield from batch.pieces(interrupt)


class _Batch:
    """The prompts of one call of `generate` or `stream`, and their answers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        temperature: float,
        seed: int,
        sampling: Sampling | Sequence[Sampling] | None,
        stop: str | Iterable[str],
        grammar: Grammar | Sequence[Grammar | None] | None,
        options: Options | None,
        steps: int,
    ):
        ids = [encode_prompt(checkpoint, prompt) for prompt in as_list(prompts)]
        stops = stop_strings(stop)
        self._answers = [Answer(checkpoint, row, stops) for row in range(len(ids))]
        self._steps, watched = steps, None
        if steps > 1 and checkpoint.tokenizer is not None:
            watched = watched_tokens(stops, checkpoint.tokenizer, checkpoint.config.vocab_size)
        self._run = Run(
            checkpoint,
            ids,
            for_each(max_new_tokens, len(ids), int | np.integer, "max_new_tokens"),
            sampling_of_rows(len(ids), temperature, seed, sampling),
            options,
            for_each(grammar, len(ids), Grammar | None, "grammar"),
            watched,
        )

    def pieces(self, interrupt: Callable[[], bool] | None) -> Iterator[Piece]:
        """Runs until all answers have ended."""
        return write_answers(self._run, self._answers, self._steps, interrupt)

    def finish(self) -> list[Generation]:
        """The answers."""
        return [
            answer.finish(self._run.prompt_logprobs(row) if self._run.options.echo else None)
            for row, answer in enumerate(self._answers)
        ]


def sampling_of_rows(
    rows: int, temperature: float, seed: int, sampling: Sampling | Sequence[Sampling] | None
) -> list[Sampling]:
    """The `Sampling` of each row. Raises ValueError for temperature or seed beside sampling, or for a wrong count."""
    if sampling is None:
        return [Sampling(temperature=temperature, seed=(seed + row) % 2**32) for row in range(rows)]
    if temperature != 0 or seed != 0:
        raise ValueError("give temperature and seed inside of sampling, not beside it")
    if isinstance(sampling, Sampling):
        seeds = [(sampling.seed + row) % 2**32 for row in range(rows)]
        return [dataclasses.replace(sampling, seed=row_seed) for row_seed in seeds]
    return for_each(sampling, rows, Sampling, "sampling")

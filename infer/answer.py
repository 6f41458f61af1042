"""An answer while it is generated: token ids become text, up to a stop string or an end token."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.text import MarkerDecoder
from phi3_jax.text.tokenizer import StreamDecoder

from .engine import NewTokens, Run
from .sampling import StopWatch, TokenLogprob

FinishReason = Literal["stop", "length", "deadline", "interrupt", "error"]

# A call of the compiled loop takes about this long at most: so much later is an interrupt seen, or a deadline met.
_CALL_SECONDS = 0.25
_CALL_SECONDS_BY_DEADLINE = 0.05


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the decoded new tokens, without special tokens, up to the stop string if there was one.
      token_ids: the new tokens; an end token, or the token that completed a stop string, is the last of them.
      finish_reason: "stop" for an end token or a stop string, "length" for a limit reached (max_new_tokens, or the
        model's context), "deadline" or "interrupt" if it was stopped from outside, "error" if it could not go on.
      logprobs: the log-probabilities of the new tokens; None if not asked for.
      prompt_logprobs: those of the prompt's tokens, with `Options.echo`.
      error: with finish_reason "error": why, and what to do about it; else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step added to one answer.

    Attributes:
      row: the index of the prompt that it answers.
      text: may be empty, while a character or a possible stop string is not complete.
      token_ids, logprobs, error: as in `Generation`.
      finish_reason: None while the answer goes on.
    """

    row: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    error: str | None = None


class Answer:
    """One answer while it is generated. Raises ValueError for stop strings without a tokenizer.

    With `markers`, special tokens that mark the calls of tools are written out in the text, for `ToolCallParser`.

    Attributes:
      finish_reason: None while it goes on.
    """

    def __init__(self, checkpoint: Checkpoint, row: int = 0, stop: Sequence[str] = (), markers: bool = False):
        if stop and checkpoint.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: put tokenizer.json or tokenizer.model into the folder")
        self._row = row
        self._ends = checkpoint.generation.eos_token_ids
        self._decoder: StreamDecoder | None = None
        if (tokenizer := checkpoint.tokenizer) is not None:
            self._decoder = MarkerDecoder(tokenizer) if markers else tokenizer.stream(skip_special_tokens=True)
        self._watch = StopWatch(stop)
        self._pieces: list[Piece] = []
        self.finish_reason: FinishReason | None = None

    def add(self, new: NewTokens, ended: FinishReason | None) -> Piece:
        """Adds new tokens, up to the end of the answer -> the piece with the text that is now certain.

        Args:
          ended: why the answer ends with these tokens, if none of them ends it; None if it may go on.
        """
        text, count = "", 0
        for token in new.token_ids:
            count += 1
            text += self._watch.push(self._decoder.push(token)) if self._decoder else ""
            if self._watch.stopped or token in self._ends:
                self.finish_reason = "stop"
                break
        else:
            self.finish_reason = "error" if new.error else ended
        if self.finish_reason is not None:
            text += self._watch.push(self._decoder.flush()) if self._decoder else ""
            text += self._watch.flush()
        logprobs = None if new.logprobs is None else new.logprobs[:count]
        error = new.error if self.finish_reason == "error" else None
        self._pieces.append(Piece(self._row, text, new.token_ids[:count], logprobs, self.finish_reason, error))
        return self._pieces[-1]

    def finish(self, prompt_logprobs: list[TokenLogprob] | None = None) -> Generation:
        """The whole answer, once it has a finish_reason."""
        return joined(self._pieces, prompt_logprobs)


def joined(pieces: Sequence[Piece], prompt_logprobs: list[TokenLogprob] | None = None) -> Generation:
    """The answer that pieces are of, the last of which has the finish_reason."""
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Generation(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        reason,
        None if pieces[0].logprobs is None else [entry for piece in pieces for entry in piece.logprobs or []],
        prompt_logprobs,
        pieces[-1].error,
    )


def write_answers(
    run: Run, answers: Sequence[Answer], steps: int = 1, interrupt: Callable[[], bool] | None = None
) -> Iterator[Piece]:
    """Advances a run until all of its answers have ended -> their pieces, as they come.

    Args:
      answers: one for each row.
      steps: how many tokens are generated at most by a call of the compiled loop. They are fewer if they would take
        longer than a quarter of a second; with a deadline a twentieth, or the time that is left.
      interrupt: called between such calls; True ends all answers as they are.
    """
    begin, deadline = time.monotonic(), run.options.deadline
    per_turn: float | None = None
    while not run.is_over:
        decoded, seconds = run.timings.decode, _CALL_SECONDS
        if deadline is not None:
            seconds = min(_CALL_SECONDS_BY_DEADLINE, begin + deadline - time.monotonic())
        turns = _turns(seconds, per_turn, steps)
        new, done = run.advance(turns), run.done
        if written := max(len(row.token_ids) for row in new):
            # With guesses a turn writes up to so many tokens: at least so many turns were taken.
            per_turn = (run.timings.decode - decoded) / math.ceil(written / (1 + run.options.guesses)) or None
        outside: FinishReason | None = None
        if interrupt is not None and interrupt():
            outside = "interrupt"
        elif deadline is not None and time.monotonic() - begin >= deadline:
            outside = "deadline"
        for answer, tokens, is_done in zip(answers, new, done, strict=True):
            if answer.finish_reason is None:
                piece = answer.add(tokens, "length" if is_done else outside)
                if piece.token_ids or piece.text or piece.finish_reason:
                    yield piece
        run.end([row for row, answer in enumerate(answers) if answer.finish_reason is not None])


def _turns(seconds: float, per_turn: float | None, most: int) -> int:
    """How many turns of so many seconds each (None: unknown) fit into `seconds`, from 1 to `most`."""
    return 1 if per_turn is None else max(1, min(most, int(seconds / per_turn)))

"""What a machine of a cluster does: holds a model, and answers the rows that Ray hands to it."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.checkpoint import load

from ...sampling import Sampling
from ..engine import Engine, EngineOptions
from .answering import answer_all, room_for
from .own_form import Defaults
from .requests import read_request


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every worker is told.

    Attributes:
      load: the arguments of `phi3_jax.load`.
      defaults, sampling: what lines do not say themselves.
      slots: how many rows a worker answers at a time.
      chunk, cache_dtype: see `EngineOptions`.
    """

    load: Mapping[str, Any]
    defaults: Defaults
    sampling: Sampling
    slots: int = 8
    chunk: int | None = None
    cache_dtype: str | None = None

    def engine_options(self, room: int) -> EngineOptions:
        """How an engine for rows of this room is set up; the queue has room for what two blocks hand over."""
        return EngineOptions(
            self.slots,
            room,
            queue=2 * self.slots,
            chunk=self.chunk,
            cache_dtype=self.cache_dtype,
            top_logprobs=self.defaults.logprobs or 0,
        )


class Worker:
    """Answers blocks of rows, several at the same time: the slots that one leaves free at its end, the next one uses.

    It is an actor of Ray Data's `map_batches`.
    """

    def __init__(self, plan: Plan):
        """Loads the model."""
        self._plan, self._checkpoint = plan, load(**plan.load)
        self._engines: dict[
            int, tuple[Engine, threading.Lock]
        ] = {}  # by the room of a row; short texts leave the large ones alone
        self._lock = threading.Lock()

    def __call__(self, block: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answers rows.

        Args:
          block: "file" and "index", which come back; "line", the number of the row in its file, and "request", itself.

        Returns:
          "file", "index", and "answer": the fields of each answer as JSON.
        """
        plan, defaults = self._plan, self._plan.defaults
        answers: dict[int, dict[str, Any]] = {}
        jobs = []
        for row, (index, line, raw) in enumerate(zip(block["index"], block["line"], block["request"], strict=True)):
            request = read_request(int(line), raw.encode(), int(index), plan.sampling)
            try:
                prompt = defaults.prompt_of(request, self._checkpoint, "the prompt")
            except ValueError as error:
                answers[row] = {"text": "", "token_ids": [], "finish_reason": "error", "error": str(error)}
            else:
                jobs.append(((row, request), defaults.job_of(request, prompt)))
        engine, turns = self._engine_for([(len(job.prompt), job.max_new_tokens) for _, job in jobs])
        for (row, request), result in answer_all(engine, jobs, turns):
            answers[row] = defaults.answer_to(request, result, self._checkpoint)
        texts = [json.dumps(answers[row], ensure_ascii=False) for row in range(len(block["index"]))]
        return {"file": list(block["file"]), "index": list(block["index"]), "answer": texts}

    def _engine_for(self, lengths: Sequence[tuple[int, int]]) -> tuple[Engine, threading.Lock]:
        """An engine with room for these jobs, and the lock of its turns."""
        plan = self._plan
        room = room_for(self._checkpoint, plan.slots, lengths, plan.cache_dtype)
        with self._lock:
            if room not in self._engines:
                self._engines[room] = Engine(self._checkpoint, plan.engine_options(room)), threading.Lock()
            return self._engines[room]

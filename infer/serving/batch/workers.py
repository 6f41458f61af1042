"""What a machine of a cluster does: holds a model, and answers the rows that Ray hands to it."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.checkpoint import load

from ...sampling import Sampling
from ..engine import Engine
from .answering import answer_all, batch_engine
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


class Worker:
    """Answers blocks of rows, several at the same time: the slots that one leaves free at its end, the next one uses.

    It is an actor of Ray Data's `map_batches`.
    """

    def __init__(self, plan: Plan):
        """Loads the model."""
        self._plan, self._checkpoint = plan, load(**plan.load)
        self._engines: dict[int, Engine] = {}  # by the room of a row; short texts leave the large ones alone
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
        engine = self._engine_for([(len(job.prompt), job.max_new_tokens) for _, job in jobs])
        for (row, request), result in answer_all(engine, jobs, is_running=True):
            answers[row] = defaults.answer_to(request, result, self._checkpoint)
        texts = [json.dumps(answers[row], ensure_ascii=False) for row in range(len(block["index"]))]
        return {"file": list(block["file"]), "index": list(block["index"]), "answer": texts}

    def _engine_for(self, lengths: Sequence[tuple[int, int]]) -> Engine:
        plan = self._plan
        with self._lock:
            engine = batch_engine(
                self._checkpoint,
                plan.slots,
                lengths,
                chunk=plan.chunk,
                cache_dtype=plan.cache_dtype,
                top_logprobs=plan.defaults.logprobs or 0,
            )
            if engine.options.room not in self._engines:
                self._engines[engine.options.room] = engine
                threading.Thread(target=_run, args=[engine], daemon=True).start()
            return self._engines[engine.options.room]


def _run(engine: Engine) -> None:
    """Takes an engine's turns. If it fails, so does the process: Ray then starts another, which gets its rows."""
    try:
        engine.run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)

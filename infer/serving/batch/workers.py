"""What a machine of a cluster does: holds a model, and answers the rows that Ray hands to it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from phi3_jax.checkpoint import load

from ...sampling import Sampling
from ..engine import Engine, EngineOptions
from .answering import Shared, answer_all, room_for
from .json_lines import LineFile
from .openai_form import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    ApiRequest,
    answer_lines,
    is_openai,
    lengths_of,
    read_api_request,
    read_api_requests,
)
from .own_form import Defaults
from .requests import Request, read_request, read_requests


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every worker is told.

    Attributes:
      load: the arguments of `phi3_jax.load`.
      defaults, sampling: what lines do not say themselves.
      slots: how many rows a worker answers at a time.
      chunk, cache_dtype: see `EngineOptions`.
      guesses: how many tokens are guessed at a time where few rows are written; 0: none.
      listed: the longest list of token ids in the `sampling` of any line.
    """

    load: Mapping[str, Any]
    defaults: Defaults
    sampling: Sampling
    slots: int = 8
    chunk: int | None = None
    cache_dtype: str | None = None
    guesses: int = 0
    listed: int = 0

    def engine_options(self, room: int, choices: int = 1) -> EngineOptions:
        """How an engine for rows of this room is set up.

        Args:
          choices: the most answers to a row. The queue has room for what two blocks hand over at a time.
        """
        return EngineOptions(
            self.slots,
            room,
            queue=2 * choices * self.slots,
            chunk=self.chunk,
            cache_dtype=self.cache_dtype,
            speculate=self.guesses,
            most_biases=max(EngineOptions.most_biases, self.listed),
            most_listed=max(EngineOptions.most_listed, self.listed),
            top_logprobs=self.defaults.logprobs or 0 if choices == 1 else MOST_LOGPROBS,
        )

    def with_lists_of(self, requests: Iterable[Request | ApiRequest]) -> Plan:
        """The same, with room for these requests' lists of token ids."""
        lists = ("logit_bias", "banned_tokens", "forced_tokens")
        ours = (request.sampling for request in requests if isinstance(request, Request))
        longest = max((len(getattr(sampling, name)) for sampling in ours for name in lists), default=0)
        return dataclasses.replace(self, listed=max(self.listed, longest))

    def read(self, file: LineFile) -> Sequence[Request] | Sequence[ApiRequest]:
        """The requests of a file in either form, which its first line shows. Raises ValueError."""
        if is_openai(file):
            return read_api_requests(file, self.sampling.seed)
        return read_requests(file, self.sampling)


class Worker:
    """Answers blocks of rows, several at the same time: the slots that one leaves free at its end, the next one uses.

    It is an actor of Ray Data's `map_batches`.
    """

    def __init__(self, plan: Plan):
        """Loads the model."""
        self._plan, self._checkpoint = plan, load(**plan.load)
        self._engines: dict[tuple[int, int], Shared] = {}  # by room and choices
        self._lock = threading.Lock()

    def __call__(self, block: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answers rows.

        Args:
          block: "file" and "index", which come back; "line", the number of the row in its file; "request", what stands
            there, and "is_openai", whether in OpenAI's form.

        Returns:
          "file", "index", and "answer": the fields of each answer as JSON.
        """
        answers: dict[int, dict[str, Any]] = {}
        ours: list[tuple[int, Request]] = []
        theirs: list[tuple[int, ApiRequest]] = []
        columns = (block[name] for name in ("index", "line", "request", "is_openai"))
        for row, (index, line, raw, is_theirs) in enumerate(zip(*columns, strict=True)):
            place = int(line), raw.encode(), int(index)
            if is_theirs:
                theirs.append((row, read_api_request(*place, self._plan.sampling.seed)))
            else:
                ours.append((row, read_request(*place, self._plan.sampling)))
        for row, answer in itertools.chain(self._answer_ours(ours), self._answer_theirs(theirs)):
            answers[row] = answer
        texts = [json.dumps(answers[row], ensure_ascii=False) for row in range(len(block["index"]))]
        return {"file": list(block["file"]), "index": list(block["index"]), "answer": texts}

    def _answer_ours(self, requests: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, dict[str, Any]]]:
        defaults, jobs = self._plan.defaults, []
        for row, request in requests:
            try:
                prompt = defaults.prompt_of(request, self._checkpoint, "the prompt")
            except ValueError as error:
                yield row, {"text": "", "token_ids": [], "finish_reason": "error", "error": str(error)}
            else:
                jobs.append(((row, request), defaults.job_of(request, prompt)))
        if not jobs:
            return
        engine = self._engine_for([(len(job.prompt), job.max_new_tokens) for _, job in jobs])
        for (row, request), result in answer_all(engine, jobs):
            yield row, defaults.answer_to(request, result, self._checkpoint)

    def _answer_theirs(self, requests: Sequence[tuple[int, ApiRequest]]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not requests:
            return iter(())
        engine = self._engine_for(lengths_of(self._checkpoint, [request for _, request in requests]), MOST_CHOICES)
        return answer_lines(self._checkpoint, engine, requests, self._plan.defaults.seconds)

    def _engine_for(self, lengths: Sequence[tuple[int, int]], choices: int = 1) -> Shared:
        """An engine with room for these jobs."""
        plan = self._plan
        room = room_for(self._checkpoint, plan.slots, lengths, plan.cache_dtype)
        with self._lock:
            if (room, choices) not in self._engines:
                engine = Engine(self._checkpoint, plan.engine_options(room, choices))
                self._engines[room, choices] = Shared(engine)
            return self._engines[room, choices]

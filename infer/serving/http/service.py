"""What the endpoints share: the engine, the model's names, and answers that end when their client goes.

    jobs --open, in a thread--> engine.submit --listener, in the engine's thread--> queue of the event loop --> pieces

The event loop never waits for the engine, for the tokenizer, or for a grammar.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import jax

from phi3_jax.checkpoint import Checkpoint, require_tokenizer
from phi3_jax.text import encode_chat

from ...answer import Generation, Piece, joined
from ...sampling import Sampling
from ..engine import Engine, Job, QueueFull, Ticket
from ..engine.pooling import Pooling
from .errors import ApiError, invalid, too_many, unavailable
from .gate.limits import Limits
from .metrics import Metrics

T = TypeVar("T")
State = Literal["warming up", "ready", "draining", "failed"]


@dataclasses.dataclass
class Service:
    """One server's model.

    Attributes:
      engine: its thread runs `work`.
      model: the name by which requests ask for it.
      adapters: names that ask for it with one of the engine's adapters.
      sampling: what requests leave open. OpenAI's defaults, unless the program was told others.
      limits: of requests.
      log_prompts: whether the log may hold what users write.
      pooling: of embeddings that leave it open.
      state: what it can do now.
      failure: why it failed.
      created: seconds since 1970, of its begin.
    """

    engine: Engine
    checkpoint: Checkpoint
    model: str
    adapters: Sequence[str] = ()
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=1.0))
    limits: Limits = dataclasses.field(default_factory=Limits)
    log_prompts: bool = False
    pooling: Pooling = "mean"
    state: State = "warming up"
    failure: str | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    on_ready: Callable[[], None] = lambda: None
    on_failure: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.tokenizer = require_tokenizer(self.checkpoint)
        self._open: set[Answers] = set()
        # Grammars may take seconds, for which nobody else shall wait.
        self._threads, self._grammar_threads = ThreadPoolExecutor(4, "jobs"), ThreadPoolExecutor(2, "grammars")
        self.metrics = Metrics(
            self.engine, {"version": version("phi3_jax"), "jax": jax.__version__, "model": self.model}
        )

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.engine.sizes.room

    def work(self, told: Callable[[int, int], None] = lambda done, of: None) -> None:
        """What the engine's thread does: warms up, then answers until the engine is stopped.

        `on_ready` is called in between. If it fails, whoever waits is told, and `on_failure` is called.
        """

        def on_step(done: int, of: int) -> None:
            if self.state != "warming up":
                raise _EndedError
            told(done, of)

        try:
            self.engine.warm_up(on_step)
            if self.state == "warming up":
                self.state = "ready"
                self.on_ready()
            self.engine.run()
        except _EndedError:
            pass
        except BaseException as error:  # whatever it is, nobody is answered any more
            self.failure = f"{type(error).__name__}: {error}"
            self.state = "failed"
            for answers in list(self._open):
                answers.fail(ApiError(500, "the engine has failed; the server restarts"))
            self.on_failure()

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a name asks for, None for the model itself. Raises ApiError (404) for another name."""
        if model == self.model:
            return None
        if model in self.adapters:
            return model
        known = ", ".join([self.model, *self.adapters])
        raise ApiError(404, f"there is no model {model[:80]!r} here; there is {known}", "model", "model_not_found")

    async def in_thread(self, make: Callable[..., T], *args: Any, param: str | None = None, **options: Any) -> T:
        """What a function gives that takes long or refuses its input: ValueError becomes an error of `param`."""
        try:
            return await asyncio.to_thread(make, *args, **options)
        except ValueError as error:
            raise invalid(str(error), param) from None

    async def encode(self, text: str, param: str = "prompt", **options: Any) -> list[int]:
        """Token ids of a text, as `Tokenizer.encode`. Raises ApiError (400) if it is far longer than the context."""
        most = self.checkpoint.config.max_position_embeddings
        return await self.in_thread(self.tokenizer.encode, text, param=param, most=most, **options)

    async def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None = None,
        param: str = "messages",
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation. Raises ApiError (400) for messages that the template refuses."""
        most = self.checkpoint.config.max_position_embeddings
        return await self.in_thread(
            encode_chat, self.tokenizer, messages, param=param, tools=tools, most=most, **options
        )

    def check_ready(self) -> None:
        """Raises ApiError (503) if it cannot answer now."""
        if self.state != "ready":
            raise unavailable(f"the server is {self.state}" if self.state != "failed" else "the engine has failed")

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; b"" for one of the embedding's that the tokenizer does not have."""
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""

    def room_for(self, prompt: Sequence[int], param: str = "prompt") -> int:
        """How long an answer to it may be. Raises ApiError (400) if there is no room, or ids that nobody has."""
        if not prompt:
            raise invalid(f"{param} is empty: give it at least one token", param)
        vocabulary = self.checkpoint.config.vocab_size
        if outside := [token for token in prompt if not 0 <= token < vocabulary]:
            raise invalid(f"{param} has ids {outside[:5]} outside of the vocabulary of {vocabulary}", param)
        if (room := min(self.context - len(prompt), self.limits.answer_tokens)) < 1:
            raise invalid(
                f"{param} has {len(prompt)} tokens, which leaves no room for an answer in the {self.context} that a "
                "request may have here: shorten it",
                param,
                "context_length_exceeded",
            )
        return room

    async def open(self, *jobs: Job) -> Answers:
        """Hands jobs to the engine -> their answers, which the caller has to close.

        Raises:
          ApiError: 400 for a job that makes no sense, 429 if the queue is full, 503 if the engine does not run.
        """
        self.check_ready()
        options = self.engine.options
        if len(jobs) > (most := options.slots + options.queue):  # trying again would not help
            raise invalid(
                f"{len(jobs)} answers are more than the {most} that have room here at a time: ask for fewer", "n"
            )
        answers = Answers(self.engine, self.metrics, self._open)
        try:
            for row, job in enumerate(jobs):
                seconds = min(job.seconds or self.limits.request_seconds, self.limits.request_seconds)
                threads = self._threads if job.grammar is None else self._grammar_threads
                await answers.submit(dataclasses.replace(job, seconds=seconds), row, threads)
        except BaseException:
            answers.close()
            raise
        if self.failure is not None:  # in the meantime
            answers.fail(ApiError(500, "the engine has failed; the server restarts"))
        return answers


class _EndedError(Exception):
    """Told to end while it warms up."""


class Answers:
    """Answers while they are written, in the order in which their pieces come; a piece's `row` is its job's index.

    Attributes:
      tickets: of the jobs.
    """

    def __init__(self, engine: Engine, metrics: Metrics, among: set[Answers]):
        self._engine, self._metrics, self._among = engine, metrics, among
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece | ApiError]()
        self._unfinished: set[int] = set()
        self._begun: set[int] = set()
        self.tickets: list[Ticket] = []
        among.add(self)

    async def submit(self, job: Job, row: int, threads: Executor) -> None:
        """Hands over the next job; a thread compiles its grammar."""

        def listen(piece: Piece) -> None:  # in the engine's thread
            self._put(dataclasses.replace(piece, row=row))

        submitting = threads.submit(self._metrics.submit, job, listen)
        try:
            self.tickets.append(await asyncio.wrap_future(submitting))
        except asyncio.CancelledError:  # a thread that has begun goes on
            submitting.add_done_callback(self._cancel_late)
            raise
        except QueueFull as error:
            raise too_many(str(error) or "too many requests wait; try again later") from None
        except (ValueError, ImportError) as error:
            raise invalid(str(error)) from None
        self._unfinished.add(row)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises ApiError if an answer cannot go on, or had no time to begin."""
        if not self._unfinished:
            raise StopAsyncIteration
        piece = await self._queue.get()
        if isinstance(piece, ApiError):
            raise piece
        if piece.finish_reason is not None:
            self._unfinished.discard(piece.row)
        if piece.finish_reason == "deadline" and not piece.token_ids and piece.row not in self._begun:
            raise unavailable("the request was not answered in time; try again")
        self._begun.add(piece.row)
        if piece.finish_reason == "error":
            raise ApiError(500, piece.error or "the answer could not go on")
        if piece.finish_reason == "interrupt":
            raise unavailable("the server has ended the answer; try again")
        return piece

    async def whole(self) -> list[Generation]:
        """All answers, complete. Raises ApiError as `__anext__`."""
        pieces: list[list[Piece]] = [[] for _ in self.tickets]
        async for piece in self:
            pieces[piece.row].append(piece)
        return [joined(each, ticket.prompt_logprobs) for each, ticket in zip(pieces, self.tickets, strict=True)]

    def fail(self, error: ApiError) -> None:
        """Whoever waits for pieces gets this error; from any thread."""
        self._put(error)

    def close(self) -> None:
        """What is not finished is cancelled at once."""
        self._among.discard(self)
        for row in self._unfinished:
            self._engine.cancel(self.tickets[row])
        self._unfinished.clear()

    def _put(self, piece: Piece | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    def _cancel_late(self, submitting: Future[Ticket]) -> None:
        if not submitting.cancelled() and submitting.exception() is None:
            self._engine.cancel(submitting.result())

"""GET /metrics, in Prometheus's form: what the engine does, and how long clients wait.

Names begin with `phi3_`. A registry of its own holds them, so that nothing else in the process appears there; and no
text of anybody does. Tokens a second are the rate of a counter: `rate(phi3_answer_tokens_total[1m])`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine, Job, Piece, Statistics, Ticket

# Upper ends of the histograms' steps, in seconds.
_SHORT = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one server, which counts what goes through `submit` and `counting`."""

    def __init__(self, engine: Engine, build: Mapping[str, str]):
        """Begins to count; `build` says what runs here, such as {"version": "0.1.0"}."""
        self._engine, self.registry = engine, CollectorRegistry()
        self.registry.register(_Collector(engine.statistics, build))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phi3_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, steps: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"phi3_{name}_seconds", text, labels, buckets=steps, registry=self.registry)

        self.requests = counter("requests", "Requests; 499: the client left", "endpoint", "status")
        self.request_time = histogram("request", "From a request to the end of its response", _LONG, "endpoint")
        self.answers = counter("answers", "Answers", "finish_reason")
        self.answer_tokens = counter("answer_tokens", "Tokens of answers, as they are written")
        self.queue_time = histogram("queue", "From an answer's submission to the reading of its prompt", _LONG)
        self.first_token = histogram("time_to_first_token", "From an answer's submission to its first token", _LONG)
        self.per_token = histogram("time_per_token", "For each token after the first: the mean of an answer", _SHORT)
        self.answer_time = histogram("answer", "From an answer's submission to its end", _LONG)
        self.embedded = counter("embedded_tokens", "Tokens of texts whose embeddings were asked for")

    def submit(self, job: Job, listener: Callable[[Piece], None]) -> Ticket:
        """`Engine.submit`, counted."""
        watched = _Watched(self, listener)
        watched.ticket = self._engine.submit(job, watched)
        return watched.ticket

    def show(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Watched:
    """The listener of one answer: tells another what it hears, and counts it."""

    def __init__(self, metrics: Metrics, listener: Callable[[Piece], None]):
        self._metrics, self._listener = metrics, listener
        self._submitted, self._first, self._tokens = time.perf_counter(), 0.0, 0
        self.ticket: Ticket | None = None

    def __call__(self, piece: Piece) -> None:
        metrics, now = self._metrics, time.perf_counter()
        if piece.token_ids:
            if not self._tokens:
                self._first = now
                metrics.first_token.observe(now - self._submitted)
            self._tokens += len(piece.token_ids)
            metrics.answer_tokens.inc(len(piece.token_ids))
        if piece.finish_reason is not None:
            metrics.answers.labels(piece.finish_reason).inc()
            metrics.answer_time.observe(now - self._submitted)
            if self._tokens > 1:
                metrics.per_token.observe((now - self._first) / (self._tokens - 1))
            if self.ticket is not None and self.ticket.begun is not None:
                metrics.queue_time.observe(max(0.0, self.ticket.begun - self._submitted))
        self._listener(piece)


class Counted:
    """A layer of ASGI that counts requests when their responses end, or their clients leave."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        """Takes the paths that are told apart; others are "other", so that clients cannot make up names."""
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, is_complete = time.perf_counter(), 499, False

        async def watched(message: Message) -> None:
            nonlocal status, is_complete
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_complete = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        finally:
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(endpoint, str(status if is_complete else 499)).inc()
            self._metrics.request_time.labels(endpoint).observe(time.perf_counter() - begin)


class _Collector:
    """Reads the engine's own numbers, whenever the metrics are asked for."""

    def __init__(self, statistics: Statistics, build: Mapping[str, str]):
        self._statistics, self._build = statistics, dict(build)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for."""
        now, read = self._statistics, max(self._statistics.prompt_tokens, 1)
        yield from (
            GaugeMetricFamily(f"phi3_{name}", text, value=value)
            for name, text, value in (
                ("slots", "Answers that can be read and written at once", now.slots),
                ("queue", "Answers that wait for a slot", now.waiting),
                ("reading", "Answers whose prompts are being read", now.reading),
                ("writing", "Answers that are being written", now.writing),
                ("embedding_requests", "Requests for embeddings that wait or are being read", now.embedding),
                ("cache_used_ratio", "Of the memory for keys and values, what answers use", now.cache_used),
                ("prefix_hit_ratio", "Of all tokens of prompts, those the prefix cache had", now.reused_tokens / read),
                ("prefix_bytes", "What the prefix cache holds", now.prefix_bytes),
            )
        )
        yield from (
            CounterMetricFamily(f"phi3_{name}", text, value=value)
            for name, text, value in (
                ("prompt_tokens", "Tokens of prompts, of answers that have ended", now.prompt_tokens),
                ("reused_tokens", "Those of them that the prefix cache had", now.reused_tokens),
                ("prefix_hits", "Prompts of which the prefix cache had a beginning", now.prefix_hits),
                ("prefix_misses", "Those of which it might have had one", now.prefix_misses),
                ("prefix_evictions", "Chunks that the prefix cache had to forget", now.prefix_evictions),
                ("guessed_tokens", "Tokens that were guessed, by speculation", now.guessed),
                ("guessed_right_tokens", "Those that were right", now.guessed_right),
                ("compilations", "Programs that were compiled, or loaded, since the warm-up", now.compiled),
            )
        )
        yield InfoMetricFamily("phi3_build", "What runs here", self._build)


async def metrics(request: Request) -> Response:
    """The endpoint."""
    shown: Metrics = request.app.state.service.metrics
    return Response(shown.show(), headers={"content-type": CONTENT_TYPE_LATEST})


routes = [Route("/metrics", metrics)]

"""/metrics in Prometheus's form: what the engine does, and how long clients wait.

Names begin with `phi3_`; seconds and tokens are what Prometheus expects of units. A registry of its own holds them, so
that nothing else in the process appears there, and no text of anybody does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Piece

_COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax, one for each program

# Upper ends of the histograms' steps, in seconds.
_SHORT = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)

# What `engine.statistics` counts, by the metric that shows it.
_COUNTERS = {
    "tokens_read": "Tokens of prompts that were read",
    "tokens_written": "Tokens of answers; its rate is the tokens a second",
    "tokens_reused": "Tokens of prompts that were taken from the prefix cache",
}
_GAUGES = {
    "waiting": "Answers that wait to be begun",
    "running": "Answers that are being read or written",
    "slots": "Answers that can be written at once",
}

Statistics = Callable[[], Mapping[str, float]]


class Metrics:
    """The metrics of one server.

    Attributes:
      routes: of the server, to read them.
    """

    def __init__(self, statistics: Statistics, build: Mapping[str, str], endpoints: Collection[str]):
        """Begins to count.

        Args:
          statistics: what the engine tells of itself, by name, whenever it is asked.
          build: what runs here, such as {"version": "0.1.0"}.
          endpoints: paths that requests are counted by; others are "other", so that a client cannot make up names.
        """
        self._registry, self._endpoints = CollectorRegistry(), frozenset(endpoints)
        self._registry.register(_Engine(statistics, build))

        def histogram(name: str, text: str, steps: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"phi3_{name}_seconds", text, labels, buckets=steps, registry=self._registry)

        self._requests = Counter("phi3_requests", "Requests", ["endpoint", "status"], registry=self._registry)
        self._answers = Counter("phi3_answers", "Answers", ["finish_reason"], registry=self._registry)
        self._request_time = histogram("request", "From a request to the end of its response", _LONG, "endpoint")
        self._answer_time = histogram("answer", "From an answer's submission to its end", _LONG)
        self._first_token = histogram("time_to_first_token", "From submission to the first token", _LONG)
        self._per_token = histogram("time_per_token", "A token after the first, on average of an answer", _SHORT)
        self._queue_time = histogram("queue", "From submission to the reading of the prompt", _LONG)
        self.routes = [Route("/metrics", self._show, methods=["GET"])]

    def watch(self, listener: Callable[[Piece], None]) -> Callable[[Piece], None]:
        """A listener that tells another what it hears, and counts it; made when a job is submitted."""
        submitted, first, tokens = time.perf_counter(), None, 0

        def heard(piece: Piece) -> None:
            nonlocal first, tokens
            now = time.perf_counter()
            if piece.token_ids and first is None:
                first = now
                self._first_token.observe(now - submitted)
            tokens += len(piece.token_ids)
            if piece.finish_reason is not None:
                self._answers.labels(piece.finish_reason).inc()
                self._answer_time.observe(now - submitted)
                if first is not None and tokens > 1:
                    self._per_token.observe((now - first) / (tokens - 1))
            listener(piece)

        return heard

    def waited(self, seconds: float) -> None:
        """Counts how long an answer waited in the queue."""
        self._queue_time.observe(seconds)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """The same application, whose requests are counted when their responses end, or clients go."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            begin, status = time.perf_counter(), "none"  # a client went before there was one

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
                self._requests.labels(endpoint, status).inc()
                self._request_time.labels(endpoint).observe(time.perf_counter() - begin)

        return counted

    async def _show(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})


class _Engine:
    """Reads the engine's own numbers when the metrics are asked for."""

    def __init__(self, statistics: Statistics, build: Mapping[str, str]):
        self._statistics, self._build = statistics, dict(build)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for."""
        numbers = self._statistics()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"phi3_{name}", text, value=numbers[name])
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"phi3_{name}", text, value=numbers[name])
        yield CounterMetricFamily("phi3_compilations", "Programs that were compiled, or loaded", value=_compiled.count)
        yield InfoMetricFamily("phi3_build", "What runs here", self._build)


class _Compiled:
    """Counts what jax compiles in this process, from the import of this module on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.count += 1


_compiled = _Compiled()

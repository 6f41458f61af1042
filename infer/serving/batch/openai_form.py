"""OpenAI's form of batches: lines with a body for one of the server's endpoints, answered by these endpoints.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}
    -> {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

The server's app runs in this process; there is no network, and no socket. So a line's answer is what the server would
say, be it an answer or what is wrong with the body.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from phi3_jax.checkpoint import Checkpoint, require_tokenizer

from ..engine import Engine
from .answering import Shared
from .json_lines import LineFile, check_id, parse_object, shown

Key = TypeVar("Key")
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MOST_CHOICES = 128  # answers to one line
MOST_LOGPROBS = 20
_NO_DEADLINE = 1e9  # seconds
_MOMENT = 0.01  # seconds
_TEMPLATE, _SYSTEM = 2, 256  # a template may indent tools, and begin with a system message of its own
_LEAST_ROOM = 4096  # tokens of a line without a limit of its own


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """One line of the input.

    Attributes:
      line: its number in the file, from 1 on.
      custom_id: its name, which comes back.
      url: the endpoint.
      body: what the endpoint is asked; with a seed.
    """

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]
    keys: ClassVar[frozenset[str]] = frozenset({"custom_id"})

    @property
    def fields(self) -> dict[str, Any]:
        """The line, with a seed."""
        return {"custom_id": self.custom_id, "method": "POST", "url": self.url, "body": self.body}

    @property
    def model(self) -> str:
        """The name by which it asks for the model."""
        return self.body.get("model") or "phi3_jax"

    @property
    def kept(self) -> Mapping[str, Any]:
        """The fields that its answer repeats."""
        return {"custom_id": self.custom_id}

    @property
    def identity(self) -> list[Any]:
        """All that its answer depends on."""
        return [self.custom_id, self.url, self.body]


def is_openai(file: LineFile) -> bool:
    """Whether the first line of a file is in OpenAI's form, which then all have to be."""
    for _, raw in file.numbered():
        try:
            return bool(parse_object(raw).keys() & {"custom_id", "body", "url"})
        except ValueError:
            return False
    return False


def read_api_requests(file: LineFile, seed: int) -> list[ApiRequest]:
    """The requests of a file in OpenAI's form.

    Args:
      seed: line i draws with seed + i, counted from 0, if its body has no seed.

    Raises:
      ValueError: there are no requests, some are not of the form, or they ask for several models. What is wrong inside
        of a body is the answer to it.
    """
    first_with_id: dict[Any, int] = {}
    first_with_model: dict[Any, int] = {}

    def read(line: int, raw: bytes, index: int) -> ApiRequest:
        request = read_api_request(line, raw, index, seed)
        check_id(first_with_id, "custom_id", request.custom_id, line)
        first_with_model.setdefault(request.body.get("model"), line)
        if len(first_with_model) > 1:
            names = " and ".join(f"{shown(name)} (line {there})" for name, there in first_with_model.items())
            raise ValueError(f"a file asks for one model, not for {names}")
        return request

    return file.read(
        read, f'a line holds "custom_id", "method": "POST", "url": one of {", ".join(ENDPOINTS)}, and "body"'
    )


def read_api_request(line: int, raw: bytes, index: int, seed: int) -> ApiRequest:
    """The request in a line, see `read_api_requests`. Raises ValueError."""
    fields = parse_object(raw)
    if wrong := sorted(fields.keys() ^ {"custom_id", "method", "url", "body"}):
        raise ValueError(f"the keys {[key[:40] for key in wrong[:10]]} are missing, or unknown")
    if not isinstance(fields["custom_id"], str) or not fields["custom_id"]:
        raise ValueError(f"custom_id={shown(fields['custom_id'])} must be a text that is not empty")
    if fields["method"] != "POST":
        raise ValueError(f'method={shown(fields["method"])} must be "POST"')
    if fields["url"] not in ENDPOINTS:
        raise ValueError(f"url={shown(fields['url'])} must be one of {', '.join(ENDPOINTS)}")
    body = fields["body"]
    if not isinstance(body, dict):
        raise ValueError(f"body={shown(body)} must be an object")
    if body.get("stream"):
        raise ValueError("stream=true: answers in a file are not streamed; leave it out")
    if not isinstance(body.get("model"), str | None):
        raise ValueError(f"model={shown(body['model'])} must be a text")
    if fields["url"] != "/v1/embeddings" and body.get("seed") is None:
        body = {**body, "seed": (seed + index) % 2**32}
    return ApiRequest(line, fields["custom_id"], fields["url"], body)


def lengths_of(checkpoint: Checkpoint, requests: Iterable[ApiRequest]) -> list[tuple[int, int]]:
    """For each request about the most tokens that a template can make of what JSON says, and the most of its answer."""
    tokenizer = require_tokenizer(checkpoint)

    def limit(body: Mapping[str, Any]) -> int:
        given = body.get("max_completion_tokens") or body.get("max_tokens")
        return given if isinstance(given, int) and given > 0 else 0

    texts = ((request.body, json.dumps(request.body, ensure_ascii=False)) for request in requests)
    found = [(_TEMPLATE * len(tokenizer.encode(text)) + _SYSTEM, limit(body)) for body, text in texts]
    return [(prompt, max(answer, _LEAST_ROOM - prompt)) for prompt, answer in found]


def answer_lines(
    checkpoint: Checkpoint,
    engine: Engine | Shared,
    requests: Sequence[tuple[Key, ApiRequest]],
    seconds: float | None = None,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Answers requests -> their keys, and what the line of an answer holds beside its custom_id, as they end.

    Args:
      engine: with room in its queue for `MOST_CHOICES` jobs of each of its slots; `Shared` as in `answer_all`.
      seconds: after which an answer ends as it is.

    Raises:
      ImportError: the extra `serve` is not installed.
      RuntimeError: the engine has failed.
    """
    if not requests:
        return
    try:
        from ..http.app import make_app
        from ..http.gate.limits import Limits
        from ..http.service import Service
    except ImportError as error:
        raise ImportError(
            f"lines in OpenAI's form need the extra serve ({error}): pip install 'phi3_jax[serve]'"
        ) from None
    shared = engine if isinstance(engine, Shared) else Shared(engine)
    longest = _NO_DEADLINE if seconds is None else seconds
    limits = Limits(body_bytes=1 << 30, request_seconds=longest, choices=MOST_CHOICES)
    # Those of several files may ask for it by several names.
    names = {request.model for _, request in requests}
    apps = {name: make_app(Service(shared.engine, checkpoint, name, limits=limits, state="ready")) for name in names}
    session = _Session(apps, shared, iter(requests))
    with asyncio.Runner() as runner:
        while (ended := runner.run(session.next_ended())) is not None:
            yield ended


class _Session(Generic[Key]):
    """Requests on their way through the apps, as many at a time as the engine has slots."""

    def __init__(self, apps: Mapping[str, Any], shared: Shared, requests: Iterator[tuple[Key, ApiRequest]]):
        self._apps, self._shared, self._requests = apps, shared, requests
        self._under_way: dict[asyncio.Task[dict[str, Any]], Key] = {}
        self._turning: asyncio.Task[None] | None = None
        self._next = next(requests, None)

    async def next_ended(self) -> tuple[Key, dict[str, Any]] | None:
        """The next answer; None after the last one."""
        self._turning = self._turning or asyncio.create_task(self._take_turns())
        while True:
            while self._next is not None and self._shared.take_slot(wait=False):
                key, request = self._next
                self._under_way[asyncio.create_task(self._answer(request))] = key
                self._next = next(self._requests, None)
            if not self._under_way and self._next is None:
                return None
            # Another thread's job may end, too, and leave its slot.
            moment = None if self._next is None else _MOMENT
            done, _ = await asyncio.wait(
                {*self._under_way, self._turning}, timeout=moment, return_when=asyncio.FIRST_COMPLETED
            )
            if self._turning in done or self._shared.engine.has_stopped:
                await self._turning  # raises
            if (task := next((task for task in self._under_way if task in done), None)) is not None:
                return self._under_way.pop(task), task.result()

    async def _answer(self, request: ApiRequest) -> dict[str, Any]:
        try:
            return await _ask(self._apps[request.model], request)
        finally:
            self._shared.give_slot()

    async def _take_turns(self) -> None:
        while True:
            if not await asyncio.to_thread(self._shared.turn):
                await asyncio.sleep(0.001)


async def _ask(app: Any, request: ApiRequest) -> dict[str, Any]:
    """Asks the app as a server does (ASGI), for a client that waits as long as it takes."""
    body = json.dumps(request.body, ensure_ascii=False).encode()
    events = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[Mapping[str, Any]] = []

    async def receive() -> Mapping[str, Any]:
        if (event := next(events, None)) is None:
            await asyncio.Event().wait()
        return event or {}

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": request.url,
        "raw_path": request.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    await app(scope, receive, send)
    answer = json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
    names = {name.lower(): value.decode() for name, value in sent[0]["headers"]}
    response = {
        "status_code": sent[0]["status"],
        "request_id": names.get(b"x-request-id", ""),
        "body": answer,
    }
    return {"id": f"batch_req_{secrets.token_hex(12)}", "response": response, "error": None}

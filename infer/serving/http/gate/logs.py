"""The log: a line of JSON for each request, and for whatever else is worth one. What users write is not in it.

{"time": "2026-01-31T12:00:00.123Z", "level": "info", "event": "request", "id": "...", "method": "POST", ...}
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import secrets
import time
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("phi3_jax.serving")
_FACTS = "phi3_jax.facts"  # what is known about a request, in its scope
_QUIET = ("/health", "/ready", "/metrics")  # asked for every few seconds


def note(scope: Scope, **facts: Any) -> None:
    """Puts facts into a request's line."""
    scope.setdefault(_FACTS, {}).update(facts)


def request_id(scope: Scope) -> str:
    """The request's name, in its line and in the header x-request-id of its response."""
    return scope[_FACTS]["id"]


class JsonLines(logging.Formatter):
    """A record as a line of JSON; `extra={"facts": {...}}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": when.replace("+00:00", "Z"), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # only ASCII, so that a line stays a line


def log_to(stream: TextIO) -> None:
    """From now on the log goes there; uvicorn's too, where something is wrong."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for logger, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn.error"), logging.WARNING)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Logged:
    """Names every request, and writes its line once it is answered."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        note(scope, id=name)
        begin, status, first = time.perf_counter(), None, None

        async def watched(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            elif first is None:
                first = time.perf_counter() - begin
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            facts = dict(scope[_FACTS])
            gone = facts.pop("gone", False) or status is None
            facts = {"id": facts.pop("id"), "method": scope["method"][:20], "path": scope["path"][:200]} | {
                "status": 499 if gone else status,  # nginx's number for clients that leave
                "first_byte": None if first is None else round(first, 4),
                "seconds": round(time.perf_counter() - begin, 4),
                **facts,
            }
            quiet = scope["path"] in _QUIET and status in (200, 503)
            LOG.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": facts})

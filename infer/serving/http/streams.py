"""Server-sent events: an answer while it is written, as lines "data: {...}"; and long lists that come as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect an answer before it passes it on
}


def event(value: Any, name: str | None = None) -> bytes:
    """A value as an event, which may have a name."""
    # Not only ASCII: text takes half of the bytes, and \u2028 ends no line of such a stream.
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"


async def listing(value: dict[str, Any], name: str, items: Iterable[Any]) -> Response:
    """A response of JSON: the value, and in it a list of this name.

    Its items are made and written one at a time, between which others have their turn: one after the other, and not all
    at once, for JSON of many megabytes takes seconds.
    """
    parts = []
    for item in items:
        parts.append(json.dumps(item, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        await asyncio.sleep(0)
    rest = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(f'{rest[:-1]},"{name}":[{",".join(parts)}]}}', media_type="application/json")


class EventStream(Response):
    """Sends chunks as they come, and a comment while none comes, so that nobody takes the connection for dead.

    A client that does not read makes `send` wait; gate/connections.py drops it after a while.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None],
        keep_alive: float = 15,
        on_error: Callable[[ApiError], bytes] = lambda error: event(error.as_json()),
        media_type: str | None = None,
    ):
        """Takes the chunks of the body.

        Args:
          close: called when the stream ends, be it early.
          keep_alive: seconds between comments; 0: none.
          on_error: an error in the middle of the answer, where it is too late for a status -> the last chunk.
        """
        super().__init__(None, headers=_HEADERS, media_type=media_type)
        del self.headers["content-length"]
        self._chunks, self._close, self._keep_alive, self._on_error = chunks, close, keep_alive, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response, as ASGI has it."""
        self._is_quiet = False
        beating = asyncio.ensure_future(self._beat(send)) if self._keep_alive else None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    self._is_quiet = False
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ApiError as error:
                await send({"type": "http.response.body", "body": self._on_error(error), "more_body": True})
            if beating is not None:
                beating.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()
            if beating is not None:
                beating.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await beating

    async def _beat(self, send: Send) -> None:
        while True:
            self._is_quiet = True
            await asyncio.sleep(self._keep_alive)
            if self._is_quiet:
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

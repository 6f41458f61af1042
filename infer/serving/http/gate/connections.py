"""One connection: uvicorn's protocol, with limits that it does not have.

A client that writes its headers byte by byte (slow-loris), or a body that nobody wants, or that does not read what it
asked for, is dropped. Every connection that waits for its client has a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ApiError, unavailable
from .limits import Limits
from .logs import LOG

# Bytes that the system keeps for a client that does not read. Else it would take megabytes, which are whole answers.
_SEND_BUFFER = 1 << 16
# Bytes that a client has to read in `write_seconds`, or all that there are.
_LEAST_READ = 1 << 14


class Connection(H11Protocol):
    """A connection from a client."""

    def __init__(self, *args: Any, limits: Limits, **options: Any):
        super().__init__(*args, **options)
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; if there are too many, it is told so."""
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        transport.set_write_buffer_limits(0)  # `pause_writing` hears of every byte that waits for the client
        if len(self.connections) > self._limits.connections:
            self._refuse(unavailable("the server has too many connections"))
        else:
            self._begin_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._end_headers()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes from the client."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or self._is_answered():  # still in the middle of the headers
            self._begin_headers()
        else:
            self._end_headers()

    def on_response_complete(self) -> None:
        """It has its answer."""
        super().on_response_complete()
        if self._is_answered():
            self._begin_headers()

    def _is_answered(self) -> bool:
        """Whether it goes on with a body that nobody reads, for its headers were refused."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def pause_writing(self) -> None:
        """It does not read."""
        super().pause_writing()
        if self._write_timer is None:
            self._watch_writing()

    def _watch_writing(self) -> None:
        left = self.transport.get_write_buffer_size() - _LEAST_READ
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self._end_writing, left)

    def _end_writing(self, left: int) -> None:
        if self.transport.get_write_buffer_size() > left:
            self.transport.abort()
        else:  # it reads, if slowly
            self._watch_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP."""
        self._refuse(ApiError(400, "this is no request in HTTP/1.1, or its headers are too large", code="invalid_http"))

    def _begin_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_seconds, self._headers_late)

    def _end_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the headers took longer than {self._limits.header_seconds:g} s to come in"))
        else:  # it never wanted anything
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """A whole response without the app, and the end; it has a line in the log, if a short one."""
        LOG.info("request", extra={"facts": {"status": error.status, "message": error.message}})
        body = error.as_bytes()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= error.headers
        events = [
            h11.Response(status_code=error.status, headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        try:
            for event in events:
                if data := self.conn.send(event):
                    self.transport.write(data)
        except h11.LocalProtocolError:  # an answer is on its way already
            self.transport.abort()
        else:
            self.transport.close()

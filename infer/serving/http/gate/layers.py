"""The layers that hold the limits of requests: who may ask, from where, and how a body comes in.

    Errors -> Origins -> Authentication -> Bodies -> endpoint

`Bodies` reads a body as a whole, then runs the endpoint, and cancels it as soon as its client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from .keys import Keys
from .limits import Limits, host_name, is_loopback
from .logs import LOG, note, request_id

# Whoever watches over the server, and whoever opens the page, which asks for the key itself, has none.
_OPEN = re.compile(r"/|/health|/ready|/favicon\.ico|/page/[\w.-]+")


class Errors:
    """Makes responses of errors; of those that nobody expected, a line in the log and a 500."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            _require_one_length(scope)
            await self._app(scope, receive, watched)
        except ApiError as error:
            if started:
                raise
            await send_error(error, send)
        except Exception as error:
            LOG.exception("an endpoint failed: %s", type(error).__name__, extra={"facts": {"id": request_id(scope)}})
            if started:
                raise  # the connection is closed, so that nobody takes the answer for complete
            await send_error(ApiError(500, "the server made a mistake; its log says more"), send)


def _require_one_length(scope: Scope) -> None:
    """Raises ApiError (400), and ends the connection, where a body is said to end in two places.

    A proxy in front may believe the other one, and take the rest of the body for another client's request.
    """
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers and "content-length" in headers:
        told = "the request has a Content-Length and a Transfer-Encoding; send one of them"
        raise ApiError(400, told, code="invalid_http", headers={"connection": "close"})


async def send_error(error: ApiError, send: Send) -> None:
    """Sends a whole response."""
    body = error.as_bytes()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if error.status in (408, 413, 431):  # the rest of the request is not read
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Origins:
    """Refuses what pages of other sites send.

    A page of evil.example can make its own name mean 127.0.0.1, and then ask this server as if it were its own: so a
    server of this machine alone answers only to names of this machine. And browsers say which page a request is from.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str] = ()):
        """Takes names, beside those of this machine, that requests may call the server by (None: any), and origins."""
        self._app, self._hosts, self._origins = app, hosts, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it. Raises ApiError (403, 421)."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")  # h11 refuses a second one
        if self._hosts is not None and (name := host_name(host)) not in self._hosts and not is_loopback(name):
            raise ApiError(421, "this server does not answer to that Host; see --allow_host", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_known(origin, host):
            raise ApiError(403, "pages of other sites may not use this server; see --cors", code="wrong_origin")
        await self._app(scope, receive, send)

    def _is_known(self, origin: str, host: str) -> bool:
        if origin in self._origins or "*" in self._origins:
            return True
        with contextlib.suppress(ValueError):
            return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
        return False


class Bodies:
    """Reads bodies within their limits, and ends what runs for a client that is gone."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it. Raises ApiError (400, 408, 413, 431)."""
        if len(scope["headers"]) > self._limits.headers:
            raise ApiError(431, f"the request has more than {self._limits.headers} headers")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self._limits.body_seconds:g} s to come in") from None
        if body is None:
            note(scope, gone=True)
            return
        left = asyncio.Event()
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        complete = False

        async def watched(message: Message) -> None:
            nonlocal complete
            # Before it is sent: servers say "disconnect" once a response is complete, too.
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        running = asyncio.ensure_future(self._app(scope, replay, watched))
        watching = asyncio.ensure_future(self._gone(receive))
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and not complete:
                left.set()
                note(scope, gone=True)
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await running
            else:
                await running  # raises what the endpoint raised
        finally:
            running.cancel()
            watching.cancel()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before its end."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limits.body_bytes} bytes")


class Authentication:
    """Lets through who has a key: `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it. Raises ApiError (401)."""
        if self._keys and not _OPEN.fullmatch(scope["path"]):
            given = Headers(scope=scope).getlist("authorization")
            scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
            number = self._keys.number_of(key.strip()) if scheme.lower() == "bearer" else None
            if number is None:
                what = "the API key is wrong" if given else "an API key is missing"
                challenge = {"www-authenticate": "Bearer"}
                raise ApiError(401, f"{what}; send it as Authorization: Bearer KEY", headers=challenge)
            note(scope, key=number)
        await self._app(scope, receive, send)

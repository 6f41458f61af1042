"""The server's life: uvicorn with our connections, and an end that answers first what it has begun."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from .connections import Connection
from .limits import Limits


class Server(uvicorn.Server):
    """Serves an app; `should_exit` ends it once what it has begun is answered, or `drain_seconds` are over."""

    def __init__(self, app: ASGIApp, limits: Limits, drain_seconds: int = 30):
        """Takes the app, and for how long it may go on answering at the end."""
        protocol: Any = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                cast(Any, app),
                loop="asyncio",
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=drain_seconds,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the program's."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 is any that is free.

    Raises:
      OSError: with the address, if nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"--host={host} --port={port}: cannot listen there: {error.strerror or error}") from None


def tell_supervisor(state: str) -> None:
    """Tells systemd, if it has asked for it, how far the service is: "READY=1", "STOPPING=1" (man sd_notify)."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.connect("\0" + place[1:] if place.startswith("@") else place)
            told.send(state.encode())


def address(listening: socket.socket) -> str:
    """Where it listens, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

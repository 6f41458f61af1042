"""A server that serves the chat page, and replays answers byte by byte: real HTTP, without a model."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import phi3_jax.infer.serving

PAGE = Path(phi3_jax.infer.serving.__file__).parent / "page"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
POLICY += "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()) + b"\n\n"


def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "demo"}
    return event(head | {"choices": [choice], "usage": None} | more)


def answer(text: str, pieces: int = 5, reason: str = "stop", cached: int = 0) -> list[bytes]:
    """An answer in OpenAI's protocol."""
    size = max(len(text) // pieces, 1)
    usage = {"prompt_tokens": 31, "completion_tokens": 12, "total_tokens": 43}
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": text[at : at + size]}) for at in range(0, len(text), size)),
        chunk({}, reason),
        chunk({}, choices=[], usage=usage),
        event(b"[DONE]"),
    ]


class Recorded(ThreadingHTTPServer):
    """What it answers is set from outside; what it was asked is kept.

    Attributes:
      answers: for each request in turn, its pieces, between them Events to wait for and pauses in seconds; or (status,
        headers, body).
      asked: the requests' bodies.
      gone: set when a client goes before its answer is complete.
      key: the key that it wants, if any.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.key: str | None = None
        self.models = ["demo"]
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Recorded

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
        if self.path == "/v1/models":
            if self.allowed():
                data = [{"id": name, "object": "model"} for name in self.server.models]
                self.reply(200, {}, json.dumps({"object": "list", "data": data}).encode())
        elif file in PAGE.iterdir():
            kind = {"Content-Type": KINDS[file.suffix], "X-Content-Type-Options": "nosniff"}
            self.reply(200, kind | {"Content-Security-Policy": POLICY}, file.read_bytes())
        else:
            self.reply(404, {}, b"")

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if not self.allowed():
            return
        found = self.server.answers.pop(0)
        if isinstance(found, tuple):
            self.reply(*found)
            return
        self.start(200, {"Content-Type": "text/event-stream; charset=utf-8"})
        self.stream(found)

    def stream(self, pieces: Iterable[bytes | float | threading.Event]) -> None:
        for piece in pieces:
            if isinstance(piece, bytes):
                self.wfile.write(piece)
            elif isinstance(piece, float):
                time.sleep(piece)
            elif not self.wait(piece):
                return

    def wait(self, event: threading.Event) -> bool:
        """False: the client has gone."""
        while not event.wait(0.01):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1):
                self.server.gone.set()
                return False
        return True

    def allowed(self) -> bool:
        if self.server.key in (None, (self.headers["Authorization"] or "").removeprefix("Bearer ")):
            return True
        self.reply(*refusal(401, "The key is not known here: <b>another</b>."))
        return False

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.start(status, {"Content-Length": str(len(body))} | headers)
        self.wfile.write(body)


def refusal(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return status, {"Content-Type": "application/json"} | headers, json.dumps({"error": error}).encode()


def torn(pieces: list[bytes], *places: bytes) -> Iterator[bytes | float]:
    """The same, with a pause in the middle of each place: of a line, or of a character."""
    whole = b"".join(pieces)
    start = 0
    for end in sorted(whole.index(place) + len(place) // 2 for place in places):
        yield from (whole[start:end], 0.05)
        start = end
    yield whole[start:]

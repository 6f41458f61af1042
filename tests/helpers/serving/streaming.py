"""A client for many streams at once that takes little time itself: it notes when each event came, and reads it later.

With the standard library alone, so that benchmarks measure a server and not a client.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

LONGEST = 1 << 20  # bytes of a line


@dataclasses.dataclass
class Reply:
    """What came of a request.

    Attributes:
      status: of HTTP; 0: none came.
      begin: when it was sent, by time.perf_counter.
      times: when each event came.
      events: their JSON, without the last, [DONE].
      complete: the last one came.
      left: we have left before the end, as was wanted.
      body: of a response that is no stream.
    """

    status: int = 0
    begin: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    events: list[bytes] = dataclasses.field(default_factory=list)
    complete: bool = False
    left: bool = False
    body: bytes = b""

    @property
    def parsed(self) -> list[dict[str, Any]]:
        """The events."""
        return [json.loads(each) for each in self.events]

    @property
    def text(self) -> str:
        """Of a completion."""
        return "".join(choice["text"] for each in self.parsed for choice in each.get("choices", ()))

    @property
    def finish_reason(self) -> str | None:
        """The last that is said."""
        said = [choice.get("finish_reason") for each in self.parsed for choice in each.get("choices", ())]
        return next((each for each in reversed(said) if each), None)

    @property
    def tokens(self) -> int:
        """Of the answer, as the server counts them."""
        usage = [each["usage"] for each in self.parsed if each.get("usage")]
        return int(usage[-1]["completion_tokens"])

    @property
    def first(self) -> float:
        """Seconds to the first event."""
        return self.times[0] - self.begin

    @property
    def end(self) -> float:
        """When the last event came."""
        return self.times[-1]


async def completion(url: str, fields: dict[str, Any], leave_after: int | None = None) -> Reply:
    """Asks /v1/completions for a stream, with its usage.

    Args:
      leave_after: so many events, after which the connection is cut.
    """
    fields = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, **fields}
    body = json.dumps(fields).encode()
    place = urlsplit(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reply = Reply(begin=time.perf_counter())
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=LONGEST)
    try:
        writer.write(head.encode() + body)
        if leave_after != 0:
            await _read(reader, reply, leave_after)
        else:
            await asyncio.sleep(random.random() * 0.05)
            reply.left = True
    finally:
        if reply.left:
            writer.transport.abort()
        writer.close()
    return reply


async def _read(reader: asyncio.StreamReader, reply: Reply, leave_after: int | None) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    reply.status = int(head.split()[1])
    is_chunked = b"transfer-encoding: chunked" in head
    if reply.status != 200:
        reply.body = await reader.read(LONGEST)
        return
    unread = b""
    while part := await (_chunk(reader) if is_chunked else reader.read(LONGEST)):
        now = time.perf_counter()
        unread += part
        *events, unread = unread.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                reply.complete = True
            elif event.startswith(b"data: "):
                reply.events.append(event.removeprefix(b"data: "))
                reply.times.append(now)
        if leave_after is not None and len(reply.events) >= leave_after:
            reply.left = True
            return


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).partition(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:-2]


async def crowd(
    url: str, requests: Sequence[dict[str, Any]], at_once: int, leaving: dict[int, int] | None = None
) -> list[Reply]:
    """Sends requests, so many at once -> their replies.

    Args:
      leaving: index of a request -> after how many events its client leaves.
    """
    waiting, replies = iter(range(len(requests))), [Reply() for _ in requests]

    async def work() -> None:
        for index in waiting:
            replies[index] = await completion(url, requests[index], (leaving or {}).get(index))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(requests))):
            group.create_task(work())
    return replies

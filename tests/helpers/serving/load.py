"""A load of requests of all lengths, some of whose clients leave: what came back, and what the server is left with."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from processes import Server
from streaming import Reply, crowd

LEAVING = 0.1  # of all clients


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
      requests: fields of completions.
      leaving: index -> after how many events the client leaves.
    """

    requests: Sequence[dict[str, Any]]
    leaving: dict[int, int]

    @classmethod
    def random(
        cls, seed: int, count: int, ids: Callable[[random.Random, int], list[int]], prompts: range, answers: range
    ) -> Load:
        """Requests of random lengths, of which a tenth is left: at once, or after some events.

        Args:
          ids: (rng, length) -> a prompt.
          prompts, answers: lengths in tokens.
        """
        rng = random.Random(seed)
        requests = [{"prompt": ids(rng, rng.choice(prompts)), "max_tokens": rng.choice(answers)} for _ in range(count)]
        chosen = rng.sample(range(count), max(1, round(LEAVING * count)))
        return cls(requests, {index: rng.choice([0, 0, 1, 2, 5, 9]) for index in chosen})

    def run(self, server: Server, at_once: int) -> list[Reply]:
        """Sends all of it, and waits until the server has nothing to do."""
        replies = asyncio.run(crowd(server.url, self.requests, at_once, self.leaving))
        wait_until_idle(server)
        return replies

    def faults(self, replies: Sequence[Reply], expected: dict[int, str]) -> list[str]:
        """What is wrong with the replies: one that is lost, cut or another than `expected`, by index."""
        found = []
        for index, reply in enumerate(replies):
            asked = f"request {index} ({len(self.requests[index]['prompt'])} tokens)"
            if reply.left or (index in self.leaving and reply.status == 0):
                continue
            if reply.status != 200 or not reply.complete or reply.finish_reason not in ("stop", "length"):
                found.append(f"{asked}: status {reply.status}, ended by {reply.finish_reason}: {reply.body[:200]!r}")
            elif reply.finish_reason == "length" and reply.tokens != self.requests[index]["max_tokens"]:
                found.append(f"{asked}: {reply.tokens} tokens instead of {self.requests[index]['max_tokens']}")
            elif index in expected and reply.text != expected[index]:
                found.append(f"{asked}: {reply.text!r} is not {expected[index]!r}")
        return found


def wait_until_idle(server: Server, seconds: float = 30) -> None:
    """Raises AssertionError if something still waits, is read or written after so long: a slot that is not free."""
    end, names = time.monotonic() + seconds, ("phi3_queue", "phi3_reading", "phi3_writing")
    while any(busy := [server.metrics()[name] for name in names]):
        assert time.monotonic() < end, f"waiting, reading, writing after {seconds:.0f} s: {busy}"
        time.sleep(0.05)

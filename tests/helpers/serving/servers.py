"""A server that runs in threads of the test's process: the real app, the real engine, a real port of this machine."""

import contextlib
import threading
import time
from collections.abc import Iterator

from phi3_jax.infer.serving.http.app import Access, make_app
from phi3_jax.infer.serving.http.gate.server import Server, address, listen
from phi3_jax.infer.serving.http.service import Service


@contextlib.contextmanager
def working(service: Service) -> Iterator[Service]:
    """Inside, the engine's thread runs, and is ready."""
    thread = threading.Thread(target=service.work, daemon=True)
    thread.start()
    wait_until(lambda: service.state != "warming up")
    yield service
    service.engine.stop()
    thread.join(10)
    assert not thread.is_alive()


@contextlib.contextmanager
def serving(service: Service, access: Access | None = None) -> Iterator[str]:
    """Inside, the app listens at the URL that it yields."""
    listening = listen("127.0.0.1", 0)
    server = Server(make_app(service, access), service.limits, drain_seconds=5)
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    yield address(listening)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def wait_until(is_so, seconds: float = 60) -> None:
    """Waits for something that threads bring about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def is_idle(service: Service) -> bool:
    """Whether nothing waits, is read or written."""
    counts = service.engine.statistics
    return counts.waiting == counts.reading == counts.writing == 0

"""phi3-serve once it knows what to serve: it listens, warms up, answers, and ends. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading

from phi3_jax.command_line import interrupts
from phi3_jax.command_line.progress import progress_bar

from ..serving.http.app import make_app
from ..serving.http.gate import Access
from ..serving.http.gate.logs import log_to
from ..serving.http.gate.server import Server, address, tell_supervisor
from ..serving.http.gate.server import listen as listen
from ..serving.http.service import Service as Service


def serve(service: Service, access: Access, listening: socket.socket, drain_seconds: int) -> int:
    """Serves until a signal comes, or the engine fails -> the exit code."""
    log_to(sys.stderr)
    print(f"phi3-serve: {service.model} at {address(listening)}, {service.engine.options.slots} slots", flush=True)
    return asyncio.run(_serve(service, Server(make_app(service, access), service.limits, drain_seconds), listening))


async def _serve(service: Service, server: Server, listening: socket.socket) -> int:
    loop, engine = asyncio.get_running_loop(), service.engine

    def on_failure() -> None:
        loop.call_soon_threadsafe(setattr, server, "should_exit", True)

    service.on_failure = on_failure
    thread = threading.Thread(target=_work, args=[service], name="engine", daemon=True)

    def end(number: signal.Signals) -> None:
        if server.should_exit:
            interrupts.end_by(number)
        if service.state != "failed":
            service.state = "draining"
        tell_supervisor("STOPPING=1")
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    thread.start()
    await server.serve(sockets=[listening])
    engine.stop()
    await asyncio.to_thread(thread.join, 2)
    if service.failure is not None:
        print(f"phi3-serve: the engine has failed, and the server with it: {service.failure}", file=sys.stderr)
    if thread.is_alive():  # inside of a compiler, which cannot be told to stop
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(service.failure is not None))
    return int(service.failure is not None)


def _work(service: Service) -> None:
    """The engine's thread."""
    with contextlib.ExitStack() as stack:
        on_progress = stack.enter_context(progress_bar("warming up", ""))

        def on_ready() -> None:
            stack.close()  # the bar disappears
            print("phi3-serve: ready", flush=True)
            tell_supervisor("READY=1")

        service.on_ready = on_ready
        service.work(on_progress)

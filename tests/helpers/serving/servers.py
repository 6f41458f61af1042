"""A server that runs in threads of the test's process: the real app, the real engine, a real port of this machine."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from chats import small_chat

import phi3_jax
from phi3_jax.infer.serving.engine import Engine, EngineOptions
from phi3_jax.infer.serving.http.app import make_app
from phi3_jax.infer.serving.http.gate import Access, Limits
from phi3_jax.infer.serving.http.gate.server import Server, address, listen
from phi3_jax.infer.serving.http.service import Service

HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"x": {"enum": [1, 23]}}, "required": ["x"]},
    },
}
# Says all that there is: tools, calls and their results.
TEMPLATE = (
    "{% for t in tools or [] %}<|user|>{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.x }}){% endfor %}<|end|>"
    "{% else %}<|user|>{% if m.role == 'system' %}!{% endif %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{{ thinking or '' }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_service(
    tiny: phi3_jax.Checkpoint, folder: Path, room: int, adapters: Mapping[str, Path] | None = None
) -> Service:
    """A service of a model with one token per character, whose engine does not run yet."""
    checkpoint = small_chat(tiny, folder)
    tokenizer = dataclasses.replace(checkpoint.tokenizer, chat_template=TEMPLATE)
    checkpoint = dataclasses.replace(checkpoint, tokenizer=tokenizer)
    engine = Engine(checkpoint, EngineOptions(slots=1, room=room, queue=4, chunk=16), adapters)
    limits = Limits(keep_alive=0.05, choices=4, body_bytes=250_000)
    return Service(engine, checkpoint, "small", [*(adapters or {})], limits=limits)


def ask(client: httpx.Client, path: str = "/v1/chat/completions", status: int = 200, **fields: Any) -> Any:
    """What the server answers to fields; those of a chat have defaults."""
    if path.endswith("chat/completions"):
        fields = {"messages": HI, "temperature": 0, "max_tokens": 8, **fields}
    response = client.post(path, json=fields)
    assert response.status_code == status, response.text
    return response.json()


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


def wait_until(is_so: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something that threads bring about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def is_idle(service: Service) -> bool:
    """Whether nothing waits, is read or written."""
    with service.engine._changed:  # statistics are those of the last turn
        return service.engine._taken == 0

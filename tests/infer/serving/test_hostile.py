"""A thousand requests that nobody should send, to phi3-serve as a process: what they get, and what becomes of it."""

import contextlib
import socket
import threading
import time

import httpx
import pytest
from chats import small_chat
from hostile import broken, spoiled
from load import wait_until_idle
from processes import phi3_serve

import phi3_jax

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
COUNT, BODY, PATIENCE = 1000, 300_000, 20.0
GOOD = {"prompt": "Good", "max_tokens": 4, "temperature": 0}
SLOW = 12  # connections that never say what they want


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile")
    phi3_jax.save(small_chat(tiny, place / "tokenizer"), place / "small")
    arguments = [f"--checkpoint={place / 'small'}", "--slots=2", "--room=256", f"--max_body={BODY}"]
    with phi3_serve(*arguments, JAX_DISABLE_MOST_OPTIMIZATIONS="1") as it:
        yield it


def send(server, hostile):
    """The status that it gets; 0 if the connection is closed without one. Raises TimeoutError if nothing happens."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(hostile.data)
            if hostile.ends:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                found += part
    return int(found.split()[1]) if found else 0


class Dawdlers(threading.Thread):
    """Connections whose headers come byte by byte; `statuses` is what they get."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self._address, self.statuses, self.seconds = ("127.0.0.1", int(server.url.rpartition(":")[2])), [], 0.0

    def run(self):
        begin = time.monotonic()
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.create_connection(self._address)) for _ in range(SLOW)]
            for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 60:
                time.sleep(0.5)
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.send(bytes([byte]))
                        connection.settimeout(0.001)
                        if found := connection.recv(1000):
                            self.statuses.append(int(found.split()[1]))
                if len(self.statuses) == SLOW:
                    break
        self.seconds = time.monotonic() - begin


def test_hostile_requests_get_what_is_right(server):
    """4xx for what is wrong, never 5xx, nothing hangs; the next good request is answered as the first was."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:

        def good():
            response = client.post("/v1/completions", json=GOOD)
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"]

        first, dawdlers = good(), Dawdlers(server)
        dawdlers.start()
        by_hand = list(broken(BODY))
        wrong = []
        for number, hostile in enumerate([*by_hand, *spoiled(COUNT - len(by_hand), seed=16)]):
            try:
                status = send(server, hostile)
            except TimeoutError:
                status = -1  # it hangs
            if status not in hostile.right:
                wrong.append(f"{hostile.name}: {status}, not {sorted(hostile.right)}")
            if number % 50 == 0:
                assert good() == first, hostile.name
            assert server.process.poll() is None, f"{hostile.name}: {server.last_words()}"
        assert not wrong, "\n" + "\n".join(wrong)
        assert good() == first
        dawdlers.join(60)
        assert dawdlers.statuses == [408] * SLOW
        assert dawdlers.seconds < 30
    wait_until_idle(server)
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log
    assert "endpoint failed" not in log

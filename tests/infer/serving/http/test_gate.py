"""What stands before the endpoints, over real connections to an app whose engine never runs."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time

import httpx
import pytest
from chats import small_chat
from servers import serving, wait_until
from starlette.applications import Starlette
from starlette.routing import Route

from phi3_jax.infer.serving.engine import Engine, EngineOptions
from phi3_jax.infer.serving.http.errors import ApiError
from phi3_jax.infer.serving.http.gate import Access, Keys, Limits, logs
from phi3_jax.infer.serving.http.gate.keys import read_keys
from phi3_jax.infer.serving.http.gate.layers import Bodies
from phi3_jax.infer.serving.http.gate.limits import is_loopback
from phi3_jax.infer.serving.http.gate.logs import JsonLines
from phi3_jax.infer.serving.http.gate.server import Server, address, listen
from phi3_jax.infer.serving.http.service import Service
from phi3_jax.infer.serving.http.streams import EventStream, event, listing

pytestmark = pytest.mark.usefixtures("quick_compilation")

ONE, TWO = "first-key-0123456789", "second-key-0123456789"
LIMITS = Limits(
    body_bytes=2000,
    headers=12,
    connections=3,
    header_seconds=0.15,
    body_seconds=0.15,
    write_seconds=0.15,
    keep_alive=0.02,
)


@pytest.fixture(scope="module")
def service(tiny, tmp_path_factory):
    checkpoint = small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))
    return Service(Engine(checkpoint, EngineOptions(slots=1, room=64, chunk=16)), checkpoint, "small", limits=LIMITS)


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as it:
        yield it


@pytest.fixture(scope="module", autouse=True)
def _closed_client():
    with CLIENT:
        yield


@pytest.fixture(scope="module")
def guarded(service):
    access = Access(Keys([ONE, TWO]), origins=["https://good.example"])
    with serving(service, access) as it:
        yield it


SMALL = 165_000  # more than systems keep
CLIENT = httpx.Client(verify=False)  # making one takes longer than what is asked


def status(url, path="/v1/models", method="GET", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return CLIENT.request(method, url + path, headers={**headers, "connection": "close"}).status_code


def talk(url, data, wait=2.0):
    """What the server sends back to raw bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                found += part
    return found


def test_only_who_has_a_key_comes_in(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    assert [status(guarded, Authorization=f"Bearer {key}") for key in (ONE, TWO)] == [200, 200]
    wrong = [ONE[:-1], f"{ONE}x", "x" * 10_000, f"{ONE} {TWO}"]
    assert [status(guarded, Authorization=f"Bearer {key}") for key in wrong] == [401] * len(wrong)
    assert [status(guarded, Authorization=value) for value in (ONE, f"Basic {ONE}", "Bearer")] == [401] * 3
    response = CLIENT.get(f"{guarded}/v1/models")
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert [status(guarded, path) for path in ("/health", "/ready", "/page/x", "/v1/x", "/health/x")] == [
        200,
        503,
        404,
        401,
        401,
    ]
    lines = [JsonLines().format(record) for record in caplog.records if record.name == logs.LOG.name]
    assert [json.loads(line).get("key") for line in lines][:2] == [1, 2]
    assert not any(key in line for line in lines for key in (ONE, TWO, ONE[:-1]))


def test_a_request_has_the_name_that_its_client_gives_if_it_is_one(url):
    given = ["mine-1.a_B", "two words", "x" * 65, '"}{', ""]
    names = [CLIENT.get(f"{url}/health", headers={"x-request-id": name}).headers["x-request-id"] for name in given]
    assert names[0] == given[0]
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names[1:])


def test_keys_come_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# for tests\n\n  {ONE}\n")
    monkeypatch.setenv("PHI3_API_KEYS", f"{TWO}, third-key-0123456789,")
    keys = read_keys(str(path))
    found = [keys.number_of(key) for key in (ONE, TWO, "third-key-0123456789", "# for tests", "")]
    assert found == [1, 2, 3, None, None]
    monkeypatch.setenv("PHI3_API_KEYS", "tooshort")
    with pytest.raises(ValueError, match="PHI3_API_KEYS: API key 1 must have") as raised:
        read_keys(None)
    assert "tooshort" not in str(raised.value)
    with pytest.raises(ValueError, match=r"keys and PHI3_API_KEYS: API key 2 must have"):
        read_keys(str(path))
    for nothing in ("", " , "):
        monkeypatch.setenv("PHI3_API_KEYS", nothing)
        with pytest.raises(ValueError, match="PHI3_API_KEYS is set, but holds no API key"):
            read_keys(None)
    monkeypatch.delenv("PHI3_API_KEYS")
    assert not read_keys(None)
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(str(path))


def test_pages_of_other_sites_are_refused(url, guarded):
    port = url.rpartition(":")[2]
    names = [f"127.0.0.1:{port}", f"localhost:{port}", "[::1]", "LOCALHOST"]
    assert [status(url, Host=name) for name in names] == [200] * 4
    wrong = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", ""]
    assert [status(url, Host=name) for name in wrong] == [421] * len(wrong)
    origins = [
        url,
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{int(port) + 1}",
        "http://[",
        "https://good.example",
    ]
    assert [status(url, Origin=origin) for origin in origins] == [200, 403, 403, 403, 403, 403]
    assert status(url, method="OPTIONS", Origin="https://good.example") == 403
    wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # by OpenAI's client in a browser
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": wanted}
    for origin, wanted in (("https://good.example", 200), ("https://evil.example", 400)):
        assert status(guarded, method="OPTIONS", Origin=origin, **asked) == wanted
    headers = {"Origin": "https://good.example", "Authorization": f"Bearer {ONE}"}
    response = CLIENT.get(f"{guarded}/v1/models", headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://good.example"
    assert status(guarded, Origin="https://evil.example", Authorization=f"Bearer {ONE}") == 403
    assert "access-control-allow-origin" not in CLIENT.get(f"{url}/v1/models").headers
    assert [is_loopback(name) for name in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "example.com")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_server_that_warms_up_says_when_to_come_again(url):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = CLIENT.post(url + path, json={})
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"GET / HTTP/1.1\r\nHost: local", 408),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{", 408),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2001\r\n\r\n", 413),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
         + (b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 2 + b"1\r\nx\r\n", 413),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 12 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 80_000, 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
         + b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_requests_that_are_late_or_large_or_none_are_told_so(url, data, wanted):
    found = talk(url, data)
    assert found.startswith(b"HTTP/1.1 %d" % wanted), found
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_connections_that_say_nothing_are_closed_and_too_many_are_refused(url, caplog):
    caplog.set_level(logging.INFO, "phi3_jax.serving")
    begin = time.monotonic()
    assert talk(url, b"") == b""
    assert 0.1 < time.monotonic() - begin < 1.5
    host, port = url.removeprefix("http://").split(":")
    wait_until(lambda: status(url, "/health") == 200)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection((host, int(port))))
        time.sleep(0.02)
        assert talk(url, b"").startswith(b"HTTP/1.1 503")
        assert 503 in [record.facts["status"] for record in caplog.records]
    wait_until(lambda: status(url, "/health") == 200)


@contextlib.contextmanager
def streaming(chunks):
    """A server of one stream; yields its address, and a list that is no longer empty once the stream is closed."""
    closed = []

    async def endpoint(request):
        return EventStream(chunks(), lambda: closed.append(1), LIMITS.keep_alive)

    server = Server(Bodies(Starlette(routes=[Route("/", endpoint)]), LIMITS), LIMITS, drain_seconds=2)
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    yield address(listening), closed
    server.should_exit = True
    thread.join(5)
    assert not thread.is_alive()


def test_a_client_that_does_not_read_is_dropped():
    async def without_end():
        while True:
            yield event("x" * 1000)
            await asyncio.sleep(0)

    with streaming(without_end) as (url, closed):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: closed, 5)


def test_a_client_that_does_not_read_the_end_is_dropped_and_one_that_reads_slowly_is_not():
    """Of the first, less is left than what makes a server wait before it goes on."""

    def read(url, first_wait, wait):
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            connection.connect((host, int(port)))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            time.sleep(first_wait)
            found = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 15):
                    found += len(part)
                    time.sleep(wait)
        return found

    for size, waits, is_whole in ((SMALL, (0.5, 0), False), (1 << 19, (0, 0.02), True)):

        async def once(size=size):
            yield b"x" * size

        with streaming(once) as (url, _):
            assert (read(url, *waits) > size) == is_whole


@pytest.mark.parametrize(
    "begin",
    [
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1900\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nX: ",
    ],
)
def test_what_comes_slowly_after_an_answer_is_not_waited_for(guarded, begin):
    host, port = guarded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.sendall(begin)
        assert connection.recv(65536).startswith((b"HTTP/1.1 401", b"HTTP/1.1 200"))
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 2:
                time.sleep(0.02)
                connection.sendall(b"x")
        assert time.monotonic() - started < 1.5


def test_a_stream_says_that_it_is_alive_and_what_went_wrong():
    async def slow():
        yield event({"a": "\u2028"}, "first")
        await asyncio.sleep(0.1)
        raise ApiError(500, "it broke")

    with streaming(slow) as (url, closed):
        text = CLIENT.get(url).text
        wait_until(lambda: closed, 5)  # the server's thread ends it
    first, *comments, last, rest = text.split("\n\n")
    assert first == 'event: first\ndata: {"a":"\u2028"}'
    assert set(comments) == {": keep-alive"}
    assert 2 <= len(comments) <= 6
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "it broke"
    assert rest == ""


def test_a_long_list_is_written_in_turns_with_others():
    made, turns = [], []

    async def other():
        while True:
            turns.append(len(made))
            await asyncio.sleep(0)

    async def write():
        task = asyncio.ensure_future(other())
        items = ({"index": made.append(i) or i, "text": "é😀"} for i in range(9))
        response = await listing({"object": "list", "n": 1}, "data", items)
        task.cancel()
        return response

    response = asyncio.run(write())
    assert set(turns) == set(range(1, 10))
    assert json.loads(response.body)["data"][3] == {"index": 3, "text": "é😀"}
    assert json.loads(asyncio.run(listing({"n": 1}, "data", [])).body) == {"n": 1, "data": []}
    assert response.headers["content-type"] == "application/json"

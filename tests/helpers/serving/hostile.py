"""Requests that nobody should send, each with the statuses that are right for it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}}

# Sound requests, of which each field is then spoiled.
SOUND: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": HI, "max_tokens": 2, "temperature": 0, "top_p": 0.5, "n": 1, "stop": ["x"], "logit_bias": {"5": 1},
        "stream": False, "seed": 1, "logprobs": True, "top_logprobs": 1, "model": "small", "response_format": SCHEMA,
        "presence_penalty": 0, "user": "u",
    },
    COMPLETIONS: {
        "prompt": "Hi", "max_tokens": 2, "temperature": 0, "n": 1, "best_of": 1, "echo": False, "logprobs": 1,
        "stream": False, "stream_options": None, "frequency_penalty": 0, "suffix": None, "top_k": 3, "min_p": 0,
        "repetition_penalty": 1, "seed": 1,
    },
    "/v1/responses": {"input": "Hi", "max_output_tokens": 16, "instructions": "x", "stream": False, "temperature": 0},
    EMBEDDINGS: {"input": "Hi", "encoding_format": "float", "pooling": "mean", "dimensions": 24},
    "/tokenize": {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
    "/api/chat": {"model": "small", "messages": HI, "stream": False, "options": {"num_predict": 2}, "format": "json"},
    "/api/generate": {"model": "small", "prompt": "Hi", "stream": False, "options": {"num_predict": 2}},
}  # fmt: skip
SOUND[CHAT + " "] = {"messages": HI, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto"}

# As JSON; what Python does not write stands as it is.
VALUES = [
    "NaN", "-Infinity", "1e400", "-1", "0", "9223372036854775808", "1" * 400, "-1e-400", "5e-324", "1.5", "true",
    '""', '"x"',
    '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"' + "y" * 20_000 + '"', "[]", "{}", "[[]]", "[null]", "[{}]",
    "[" * 100 + "]" * 100, '{"a":' * 60 + "1" + "}" * 60, '[{"role": "user"}]', '[{"role": "king", "content": "x"}]',
    '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]', "[1, -1]",
    "[1000000000]", '{"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}', '{"5": 1e9}', '{"-1": 1}',
    '{"type": "regex"}', "[true]", '[["x"]]',
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hostile:
    """A request.

    Attributes:
      name: what is wrong with it.
      data: its bytes.
      right: statuses that it may get; 0: the connection is closed without any.
      ends: the client sends no more, and says so.
    """

    name: str
    data: bytes
    right: frozenset[int]
    ends: bool = False


def request(
    path: str, body: bytes = b"", method: str = "POST", headers: dict[str, str] | None = None, host: str = "localhost"
) -> bytes:
    """A request in HTTP/1.1, after which the connection is closed."""
    given = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (given | (headers or {})).items() if value)
    return f"{method} {path.strip()} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def spoiled(count: int, seed: int) -> Iterator[Hostile]:
    """Sound requests with a field of another value; some of these make sense, so 200 is right, too."""
    every = [(path, field, value) for path, fields in SOUND.items() for field in fields for value in VALUES]
    for path, field, value in random.Random(seed).sample(every, count):
        rest = {name: each for name, each in SOUND[path].items() if name != field}
        body = (json.dumps(rest)[:-1] + ("," if rest else "") + f'"{field}": {value}' + "}").encode()
        yield Hostile(f"{path.strip()} with {field}={value[:60]}", request(path, body), frozenset({200, 400, 404}))


def broken(limit: int) -> Iterator[Hostile]:
    """Bodies and headers that are wrong. Limit: of a body's bytes."""
    sound = json.dumps(SOUND[COMPLETIONS]).encode()
    for path in [each for each in SOUND if each.strip() == each]:
        for name, body in BODIES.items():
            yield Hostile(f"{path}: {name}", request(path, body), frozenset({400}))
        for size in (0, 1, len(sound) // 2, len(sound) - 1):
            data = request(path, sound[:size], headers={"Content-Length": str(len(sound))})
            yield Hostile(f"{path}: ends after {size} bytes", data, frozenset({0, 400}), ends=True)
        large = request(path, b"x" * 1000, headers={"Content-Length": str(limit + 1)})
        yield Hostile(f"{path}: says that it is too large", large, frozenset({413}))
        others = {"text/plain": 415, "multipart/form-data; boundary=x": 415, "": 415}
        for kind, status in others.items() if not path.startswith("/api/") else ():
            yield Hostile(
                f"{path}: of {kind or 'no type'}",
                request(path, sound, headers={"Content-Type": kind}),
                frozenset({status}),
            )
        yield Hostile(f"{path}: gzip", request(path, sound, headers={"Content-Encoding": "gzip"}), frozenset({415}))
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "X" * 50):
            yield Hostile(f"{method[:9]} {path}", request(path, sound, method), frozenset({405}))
    yield from _lengths(sound, limit)
    for name, (headers, right) in HEADERS.items():
        yield Hostile(name, request(COMPLETIONS, sound, headers=headers), frozenset(right))
    for path in PATHS:
        yield Hostile(f"path {path[:60]!r}", request(path, method="GET"), frozenset({400, 404, 405}))
    for data in LINES:  # 421: without a Host
        yield Hostile(f"no request: {data[:40]!r}", data, frozenset({0, 400, 421}), ends=True)


def _lengths(sound: bytes, limit: int) -> Iterator[Hostile]:
    """What says two things about its own length, or lies."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    length, chunked = b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"
    size = len(sound)
    bad, either, none = frozenset({400}), frozenset({200, 400}), frozenset({0, 400})
    yield Hostile("two lengths", head + length % size + length % (size - 1) + b"\r\n" + sound, bad)
    yield Hostile("two equal lengths", head + length % size * 2 + b"\r\n" + sound, either)
    yield Hostile(
        "a length and chunks", head + length % 3 + chunked + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, sound), bad
    )
    for text in (b"-1", b"+5", b"0x10", b"1e3", b"99999999999999999999999", b"5, 5", b"\xb2", b" ", b"5 5", b"NaN"):
        yield Hostile(
            f"a length of {text!r}", head + b"Content-Length: " + text + b"\r\n\r\n" + sound, frozenset({400, 413})
        )
    chunks = {
        "without an end": b"%x\r\n%s\r\n" % (size, sound), "of no size": b"zz\r\n%s\r\n0\r\n\r\n" % sound,
        "of a negative size": b"-5\r\n%s\r\n0\r\n\r\n" % sound, "that are longer": b"5\r\n%s\r\n0\r\n\r\n" % sound,
        "that are shorter": b"fffffff\r\n%s\r\n0\r\n\r\n" % sound, "of endless size": b"f" * 400 + b"\r\n" + sound,
    }  # fmt: skip
    for name, data in chunks.items():
        yield Hostile(f"chunks {name}", head + chunked + b"\r\n" + data, none, ends=True)
    too_many = b"ffff\r\n" + b" " * 0xFFFF + b"\r\n"
    yield Hostile(
        "chunks without end", head + chunked + b"\r\n" + too_many * (limit // 0xFFFF + 2), frozenset({413}), ends=True
    )
    for coding in (b"gzip", b"chunked, chunked", b"identity, chunked", b"\x0bchunked"):
        yield Hostile(
            f"coded {coding!r}",
            head + b"Transfer-Encoding: " + coding + b"\r\n\r\n",
            frozenset({0, 400, 501}),
            ends=True,
        )


_DEEP = 100_000
BODIES = {
    "empty": b"", "no JSON": b"x", "a list": b"[]", "a number": b"1", "null": b"null", "half": b'{"prompt": "x"',
    "other quotes": b"{'prompt': 'x'}", "twice": b'{"prompt": "x", "prompt": "y"}', "a key of NaN": b'{NaN: 1}',
    "bad UTF-8": b'{"prompt": "\xff\xfe"}', "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "Latin-1": b'{"prompt": "\xe9"}', "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "NUL": b'{"prompt": "\x00"}', "a NUL behind": b"{}\x00", "more behind": b"{}{}",
    "an unknown field": b'{"zzz": 1}',
    "deep lists": b"[" * _DEEP + b"]" * _DEEP, "a deep field": b'{"prompt":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "many lists": b'{"prompt": [' + b"[]," * 90_000 + b"[]]}",
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(20_000)) + b"}",
    "a long number": b'{"prompt": ' + b"9" * 50_000 + b"}",
}  # fmt: skip
HEADERS = {
    "many headers": ({f"X-{i}": "1" for i in range(100)}, {431}),
    "a huge header": ({"X-Large": "a" * 200_000}, {400, 431}),
    "a huge cookie": ({"Cookie": "a=b; " * 50_000}, {400, 431}),
    "a space in a name": ({"X Y": "1"}, {400}),
    "a NUL in a value": ({"X-Null": "a\x00b"}, {400}),
    "a line in a value": ({"X-Line": "a\rb"}, {400}),
    "a folded value": ({"X-Fold": "a\r\n b"}, {200, 400}),
    "no name": ({"": "x", " : ": "y"}, {400}),
    "another host": ({"Host": "evil.example"}, {421}),
    "two hosts": ({"Host": "localhost\r\nHost: evil.example"}, {400}),
    "an empty host": ({"Host": " "}, {400, 421}),
    "another site": ({"Origin": "http://evil.example"}, {403}),
    "no site": ({"Origin": "null"}, {403}),
    "an odd origin": ({"Origin": "http://[::1"}, {403}),
    "bytes beyond ASCII": ({"X-Bytes": "\xff\xfe\x80"}, {200, 400}),
    "Expect": ({"Expect": "200-maybe"}, {200, 400, 417}),
    "an odd key": ({"Authorization": "Bearer " + "\xff" * 5000}, {200, 400}),
    "a range": ({"Range": "bytes=0-" + "9" * 1000}, {200, 400}),
    "an upgrade": ({"Upgrade": "websocket", "Connection": "Upgrade, close"}, {200, 400, 426}),
    "another protocol": ({"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings, close"}, {200, 400, 426}),
    "a forwarded address": ({"X-Forwarded-For": "1.2.3.4" * 100}, {200}),
    "an odd type": ({"Content-Type": "application/json; charset=" + "x" * 1000}, {200, 415}),
}
PATHS = [
    "/..", "/../../etc/passwd", "/page/../../../etc/passwd", "/page/..%2f..%2fetc%2fpasswd", "/page/%2e%2e/%2e%2e/x",
    "/page/.css", "/page/%00.js", "/page/index.html%00.js", "/page//etc/passwd", "//", "//evil.example/", "/%", "/%zz",
    "/%ff%fe", "/v1/models/..%2f..", "/v1/models/%00", "/v1/models/" + "x" * 4000, "/v1/models/small/", "/v1//models",
    "/v1/completions/", "/V1/MODELS", "/" + "a/" * 2000, "/page/" + "x" * 3000 + ".js", "http://evil.example/x", "*",
    "/page/con.js", "/page/page.css/", "/page/..\\..\\x.js", "/page/.", "/.git/config", "/\x7f", "/docs",
    "/favicon.ico/x",
]  # fmt: skip
LINES = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\xff" * 5000,
    b"GET / HTTP/1.1\nHost: x\n\n"[:15], b"GET /" + b"a" * 100_000, b"POST / HTTP/1.1\r\nHost", b"SSH-2.0-x\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\na\r\n\r\n",
]  # fmt: skip

"""The description of the server beside what it takes: every field that is described, at its bounds and beyond."""

from collections.abc import Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from chats import small_chat
from starlette.testclient import TestClient

import phi3_jax
from phi3_jax.infer.serving.engine import Engine, EngineOptions
from phi3_jax.infer.serving.http import fields, ollama
from phi3_jax.infer.serving.http.app import ENDPOINTS, make_app
from phi3_jax.infer.serving.http.service import Service

MESSAGES = [{"role": "user", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}]
# Requests that would be answered, with what some fields need beside them; one for each form of the body.
BODIES = [
    ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "stream": True, "tools": TOOLS}),
    ("/v1/completions", {"prompt": "a", "stream": True}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/embeddings", {"input": "a"}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", {"messages": MESSAGES, "tools": TOOLS}),
    ("/detokenize", {"tokens": [1]}),
    ("/api/chat", {"model": "small", "messages": MESSAGES}),
    ("/api/generate", {"model": "small", "prompt": "a"}),
]


@pytest.fixture(scope="module")
def service(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Service:
    small = small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))
    service = Service(Engine(small, EngineOptions(slots=2, room=64, chunk=16)), small, "small")
    service.state = "ready"  # nothing is ever answered here
    return service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    it = TestClient(make_app(service), base_url="http://localhost")
    with start_blocking_portal() as it.portal:  # one event loop for all requests
        yield it


@pytest.fixture(scope="module")
def description(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def properties(description: dict[str, Any], path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Of the form that a body has."""
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    (form,) = [form for form in schema.get("anyOf", [schema]) if body.keys() <= form["properties"].keys()]
    assert form["additionalProperties"] is False
    return form["properties"]


def refused(client: TestClient, path: str, body: dict[str, Any]) -> str:
    """The field that is refused; every body has one that does not exist, which is found last."""
    response = client.post(path, json=body | {"zzz": 1})
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    if isinstance(error, str):  # ollama's form
        return "zzz" if "'zzz'" in error else error
    return error["param"]


def values(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values for a field, and whether they are good."""
    for each in schema.get("anyOf", []):
        yield from ((value, True) for value, good in values(each) if good)
    if "anyOf" in schema or not schema:
        return
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield "nonsense", False
        return
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    yield (None, "null" in kinds) if "null" in kinds else (None, False)
    if kinds == ["null"]:
        yield 1, False
    if "number" in kinds or "integer" in kinds:
        least, most = schema.get("minimum"), schema.get("maximum")
        yield from ((value, True) for value in (least, most) if value is not None)
        yield from ((value, False) for value in ("1", True))
        step = 1 if "integer" in kinds else 1e-3
        beyond = [least is not None and least - step, most is not None and most + step]
        yield from ((value, False) for value in beyond if value is not False and abs(value) < 2**63)  # else no JSON
        if "exclusiveMinimum" in schema:
            yield schema["exclusiveMinimum"], False
    if "string" in kinds:
        yield from (("a", True), (1, False))
        if "maxLength" in schema:
            yield from (("a" * schema["maxLength"], True), ("a" * (schema["maxLength"] + 1), False))
    if "boolean" in kinds:
        yield from ((True, True), (False, True), ("true", False), (1, False))
    if "array" in kinds:
        good = [value for value, is_good in values(schema["items"]) if is_good and value is not None]
        yield from (([value], True) for value in good)
        yield "nonsense", False
        if "maxItems" in schema and good:
            yield from ((good[:1] * schema["maxItems"], True), (good[:1] * (schema["maxItems"] + 1), False))
    if "object" in kinds:
        needed = {name: next(v for v, good in values(schema["properties"][name]) if good) for name in needs(schema)}
        yield needed, True
        yield [1], False
        for name, inner in schema.get("properties", {}).items():
            if name not in needed and inner:
                yield from ((needed | {name: value}, good) for value, good in values(inner) if not good)


def needs(schema: dict[str, Any]) -> list[str]:
    return schema.get("required", [])


def test_every_endpoint_is_described(description):
    paths = {route.path.replace(":path", "") for endpoint in ENDPOINTS for route in endpoint.routes}
    assert paths == description["paths"].keys()
    assert {path for path, _ in BODIES} == {path for path, each in description["paths"].items() if "post" in each}


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_fields_are_those_that_are_read(client, description, path, body, monkeypatch):
    read, get = set(), fields.Fields.get

    def recorded(self, key):
        read.add(self.name(key))
        return get(self, key)

    monkeypatch.setattr(fields.Fields, "get", recorded)
    assert refused(client, path, body | {"options": {}} if path.startswith("/api") else body) == "zzz"
    described = properties(description, path, body)
    ignored = ollama.IGNORED if path.startswith("/api") else fields.IGNORED if path.startswith("/v1") else ()
    read -= set() if "messages" in body else {"messages"}  # tells the two forms of /tokenize apart
    assert {name for name in read if "." not in name and "[" not in name} | set(ignored) == described.keys()
    if "options" in described:
        options = {name.removeprefix("options.") for name in read if name.startswith("options.")}
        assert options | {"repeat_penalty", *ollama.IGNORED_OPTIONS} == described["options"]["properties"].keys()


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_values_are_taken_and_refused_as_described(client, description, path, body):
    for name, schema in properties(description, path, body).items():
        for value, good in values(schema):
            found = refused(client, path, body | {name: value})
            if found == "prompt" and name == "messages":
                continue  # /tokenize without messages has another form
            if good:
                assert found == "zzz", (name, value)
            else:
                told = [name, *value] if name == "options" and isinstance(value, dict) else [name]
                assert any(each in str(found) for each in told), (name, value, found)

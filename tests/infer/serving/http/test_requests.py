"""Requests that need no engine: what is wrong is found before one runs; tokens, models, and calls in texts."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from chats import END
from servers import HI, TOOL, ask, serving, small_service, wait_until

from phi3_jax.infer import Piece
from phi3_jax.infer.serving.http.chat import Choice
from phi3_jax.infer.serving.http.fields import ToolUse
from phi3_jax.infer.serving.http.gate.logs import JsonLines
from phi3_jax.text import encode_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOM = 128
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "x=1"}}]}


@pytest.fixture(scope="module")
def service(tiny, tmp_path_factory):
    service = small_service(tiny, tmp_path_factory.mktemp("tokenizer"), ROOM)
    service.state = "ready"
    return service


@pytest.fixture(scope="module")
def client(service):
    with serving(service) as url, httpx.Client(base_url=url, timeout=20) as it:
        yield it


def test_tools_are_shown_unless_they_may_not_be_called(client):
    def written(**fields):
        found = ask(client, "/tokenize", **fields)["tokens"]
        return ask(client, "/detokenize", tokens=found)["prompt"]

    assert written(messages=HI, tools=[TOOL]) == "<|user|>add<|user|>Hi<|end|><|assistant|>"
    assert written(messages=HI, tools=[TOOL], tool_choice="none") == "<|user|>Hi<|end|><|assistant|>"
    call = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": '{"x": 23}'}}
    thinking = {"chat_template_kwargs": {"thinking": "?"}}
    assert written(messages=HI, **thinking) == "<|user|>Hi<|end|>?<|assistant|>"
    turns = [
        {"role": "developer", "content": "Be"},
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call], "audio": None},
        {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "42"}]},
    ]
    wanted = "<|user|>add<|user|>!Be<|end|><|user|>Hi<|end|>add(23)<|end|><|user|>42<|end|>"
    assert written(messages=turns, tools=[TOOL], add_generation_prompt=False) == wanted


@pytest.mark.parametrize("most", [None, 1])
def test_calls_that_a_model_chooses_are_found_in_its_text(service, most):
    text = 'So: <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call><tool_call>{"name": "add"}</tool_call>'
    choice, deltas = Choice(service, ToolUse([TOOL], most=most)), []
    for i, character in enumerate(text):
        end = "stop" if i == len(text) - 1 else None
        deltas += choice.add(Piece(0, character, [5], None, end))
    count = most or 2
    assert [(call.name, call.arguments) for _, call in choice.calls] == [("add", {"x": 1}), ("add", {})][:count]
    assert (choice.finish_reason, choice.tokens) == ("tool_calls", len(text))
    assert "".join(delta.get("content", "") for delta in deltas) == "So: "
    parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [part["index"] for part in parts] == [0, 0, 1, 1][: 2 * count]
    assert [part["function"]["arguments"] for part in parts] == ["", '{"x": 1}', "", "{}"][: 2 * count]
    assert len({part["id"] for part in parts if "id" in part}) == count
    message = choice.whole()["message"]
    assert (message["content"], len(message["tool_calls"])) == ("So:", count)


def test_text_becomes_tokens_and_back(service, client):
    assert ask(client, "/tokenize", prompt="Hello", return_token_strs=True) == {
        "count": 5,
        "max_model_len": ROOM,
        "tokens": service.tokenizer.encode("Hello"),
        "token_strs": list("Hello"),
    }
    found = ask(client, "/tokenize", messages=HI)
    assert found["tokens"] == encode_chat(service.tokenizer, HI)
    assert ask(client, "/detokenize", tokens=found["tokens"]) == {"prompt": "<|user|>Hi<|end|><|assistant|>"}
    assert "no id" in ask(client, "/detokenize", 400, tokens=[97])["error"]["message"]


def test_the_text_that_an_answer_goes_on_with_is_not_closed(service, client, monkeypatch):
    """Some tokenizers put an end token behind each text: the model would have nothing to add."""
    monkeypatch.setattr(service, "tokenizer", dataclasses.replace(service.tokenizer, closing=(END,)))
    for path, more in (("/v1/completions", {}), ("/api/generate", {"model": "small", "raw": True})):
        error = ask(client, path, 400, prompt="x" * ROOM, **more)["error"]
        assert f"prompt has {ROOM} tokens" in str(error), path
    assert ask(client, "/tokenize", prompt="Hello")["count"] == 5


def test_more_answers_than_ever_have_room_are_refused_for_good(service, client, monkeypatch):
    monkeypatch.setattr(service, "limits", dataclasses.replace(service.limits, choices=8))
    error = ask(client, status=400, n=6)["error"]
    assert (error["param"], "6 answers are more than the 5" in error["message"]) == ("n", True)


def test_grammars_that_take_long_hold_up_nobody_else(service, client, monkeypatch):
    go_on, begun, submit = threading.Event(), [], service.engine.submit

    def slow(job, listener):
        if job.grammar is not None:
            begun.append(job)
            assert go_on.wait(20)
        return submit(job, listener)

    monkeypatch.setattr(service.engine, "submit", slow)
    wrong = {"logit_bias": {"98": 1}}  # found at the end, in the same place
    with ThreadPoolExecutor(13) as threads:
        fields = wrong | {"status": 400, "structured_outputs": {"choice": ["a"]}}
        asked = [threads.submit(ask, client, **fields) for _ in range(12)]
        wait_until(lambda: len(begun) == 2 and len(service._open) == 12)
        assert "98" in ask(client, status=400, **wrong)["error"]["message"]
        body = {"messages": HI, "structured_outputs": {"regex": "b"}}
        leaving = threads.submit(client.post, "/v1/chat/completions", json=body, timeout=0.5)
        wait_until(lambda: len(service._open) == 13)
        with pytest.raises(httpx.ReadTimeout):
            leaving.result()
        wait_until(lambda: len(service._open) == 12)  # who has left is forgotten
        go_on.set()
        assert all("98" in each.result()["error"]["message"] for each in asked)
    assert len(begun) == 12


def test_schemas_that_would_take_long_or_write_into_the_log_are_refused(client):
    many = {"type": "object", "properties": {str(i): True for i in range(1025)}}
    for schema, reason in (
        (many, "1025 entries"),
        ({"items": [True] * 2000, "anyOf": [{}, many]}, "1025 entries"),
        ({"enum": ["x" * 200_000]}, "131072 characters"),
        ({"type": "string", "format": "a\nb", "x-guidance": {"lenient": True}}, "lenient"),
    ):
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        message = ask(client, status=400, response_format=form)["error"]["message"]
        assert reason in message, schema
    options = {"choice": ["x" * 40_000, "y" * 40_000]}
    assert "65536 characters" in ask(client, status=400, structured_outputs=options)["error"]["message"]


def test_models_are_known_by_their_names(client):
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["small"]
    assert client.get("/v1/models/small").json()["object"] == "model"
    for response in (client.get("/v1/models/gpt-4"), client.post("/v1/chat/completions", json={"model": "gpt-4"})):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    assert (client.get("/health").json(), client.get("/ready").status_code) == ({"status": "ready"}, 200)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]}, "messages[0].content"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 5}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"98": 1}}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "q"}}}}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "("}}, None),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"messages": [CALLED]}, "messages[0].tool_calls[0].function.arguments"),
        ({"temprature": 1}, "temprature"),
        ({"audio": {"voice": "x"}}, "audio"),
    ],
)
def test_wrong_requests_are_told_which_field_is_wrong(service, client, fields, param):
    error = ask(client, status=400, **fields)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert not service.engine._new  # nothing of it came so far


@pytest.mark.parametrize("prompt", [[5] * (ROOM + 1), ["a", [5] * (ROOM + 1)], [[5], [5] * (ROOM + 1)]])
def test_lists_of_more_ids_than_have_room_are_refused_before_they_are_read(client, prompt):
    error = ask(client, "/v1/completions", 400, prompt=prompt)["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert f"{ROOM + 1} entries" in error["message"]


def test_a_mistake_of_ours_is_in_the_log_with_the_requests_name(service, client, caplog, monkeypatch):
    monkeypatch.setattr(service, "adapter_of", lambda name: 1 / 0)
    response = client.post("/v1/chat/completions", json={"messages": HI})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "division" not in response.text
    (line,) = [json.loads(JsonLines().format(record)) for record in caplog.records if record.exc_info]
    assert line["id"] == response.headers["x-request-id"]
    assert line["event"] == "an endpoint failed: ZeroDivisionError"
    assert "adapter_of" in line["traceback"]


def test_bodies_that_are_no_json_are_refused(client):
    def post(data, kind="application/json", **headers):
        response = client.post("/v1/chat/completions", content=data, headers={"content-type": kind, **headers})
        return response.status_code, response.json()["error"]["code"]

    for data in (b"", b"{", b"[]", b'{"n": NaN}', b'{"n": 1, "n": 2}', b"\xff", b"[" * 40_000, b'{"n": 1e999}'):
        assert post(data) == (400, "invalid_json"), data[:20]
    assert post(b"{}", "text/plain") == (415, "unsupported_media_type")
    assert post(b"{}", **{"content-encoding": "gzip"}) == (415, "unsupported_media_type")
    assert post(b" " * 250_001) == (413, "request_too_large")
    assert client.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_the_page_may_load_only_its_own_files_and_nothing_else_is_served(client):
    for path, kind in (("/", "text/html"), ("/page/chat.js", "text/javascript"), ("/page/page.css", "text/css")):
        response = client.get(path)
        assert (response.status_code, response.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(
            policy
        )
        assert not any(word in "; ".join(policy) for word in ("unsafe", "*", "http"))
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    for path in (
        "..%2f__init__.py",
        "%2e%2e/__init__.py",
        "page.css%00",
        "__init__.py",
        "x.js",
        "..%5cx.js",
        ".js",
    ):
        assert client.get(f"/page/{path}").status_code == 404, path

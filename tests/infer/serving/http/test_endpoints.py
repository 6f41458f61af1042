"""Responses, embeddings, ollama's protocol, metrics and the OpenAPI description, on a tiny model."""

import base64
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anyio.from_thread import start_blocking_portal
from chats import small_chat
from servers import wait_until
from starlette.testclient import TestClient

import phi3_jax
from phi3_jax.infer import Generation, Options, Sampling, generate
from phi3_jax.infer.serving.engine import Engine, EngineOptions
from phi3_jax.infer.serving.http.app import make_app
from phi3_jax.infer.serving.http.service import Service
from phi3_jax.model import Phi3

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOM = 128


@pytest.fixture(scope="module")
def small(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    return small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def service(small: phi3_jax.Checkpoint) -> Iterator[Service]:
    # The sizes of test_server.py, whose programs it shares.
    engine = Engine(small, EngineOptions(slots=1, room=ROOM, queue=4, chunk=16))
    service = Service(engine, small, "small", sampling=Sampling())
    service.state = "ready"  # programs are compiled when they are needed
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield service
    engine.stop()
    thread.join()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    it = TestClient(make_app(service), base_url="http://localhost")
    with start_blocking_portal() as it.portal:  # one event loop for all requests
        yield it


def answer(small: phi3_jax.Checkpoint, prompt: str | list[int], most: int) -> Generation:
    """What `generate` answers to a message, or to token ids."""
    if isinstance(prompt, str):
        prompt = phi3_jax.encode_chat(small.tokenizer, [{"role": "user", "content": prompt}])
    options = Options(room=ROOM, prefill_chunk=16, logprobs=2, echo=True)
    return generate(small, prompt, max_new_tokens=most, options=options)[0]


def events(text: str) -> list[tuple[str, dict]]:
    """(name, data) of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.slow
def test_a_response_is_the_answer_with_its_usage(client, small):
    body = {"model": "small", "input": "hello", "max_output_tokens": 6, "metadata": {"a": "b"}, "store": True}
    told = client.post("/v1/responses", json=body).json()
    (item,) = told["output"]
    (part,) = item["content"]
    assert part["text"] == answer(small, "hello", 6).text
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (told["metadata"], told["store"]) == ({"a": "b"}, False)
    usage = told["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (8, 6, 14)


@pytest.mark.slow
def test_messages_with_parts_and_instructions_are_the_same_conversation(client, small):
    parts = [{"type": "input_text", "text": "he"}, {"type": "input_text", "text": "llo"}]
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "id": "x", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": parts},
    ]
    told = client.post("/v1/responses", json={"input": items, "max_output_tokens": 4}).json()
    messages = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "hello"))
    ]
    ids = phi3_jax.encode_chat(small.tokenizer, messages)
    assert told["usage"]["input_tokens"] == len(ids)
    assert told["output"][0]["content"][0]["text"] == answer(small, ids, 4).text
    # The tiny model's template drops system messages, unless they have a word that it refuses.
    wrong = client.post("/v1/responses", json={"input": "a", "instructions": "forbidden"})
    assert (wrong.status_code, "not a word" in wrong.text, wrong.json()["error"]["param"]) == (400, True, "input")


@pytest.mark.slow
def test_a_streamed_response_has_its_events_in_order(client, small):
    response = client.post("/v1/responses", json={"input": "hello", "max_output_tokens": 6, "stream": True})
    told = events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [data["type"] for _, data in told] == [name for name, _ in told]
    assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
    names = [name.removeprefix("response.") for name, _ in told]
    deltas = names.count("output_text.delta")
    first = ["created", "in_progress", "output_item.added", "content_part.added"]
    last = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert names == [*first, *["output_text.delta"] * deltas, *last]
    text = "".join(data["delta"] for name, data in told if name.endswith("delta"))
    assert text == answer(small, "hello", 6).text
    assert deltas > 1
    whole = told[-1][1]["response"]
    assert whole["output"][0]["content"][0]["text"] == told[-4][1]["text"] == text
    assert whole["usage"]["output_tokens"] == 6
    ids = {data["item_id"] for _, data in told if "item_id" in data} | {whole["output"][0]["id"]}
    assert len(ids) == 1


@pytest.mark.slow
def test_log_probabilities_are_listed(client, small):
    body = {"input": "hello", "max_output_tokens": 6, "top_logprobs": 2}
    entries = answer(small, "hello", 6).logprobs
    told = client.post("/v1/responses", json=body).json()["output"][0]["content"][0]["logprobs"]
    assert [each["logprob"] for each in told] == pytest.approx([entry.logprob for entry in entries], abs=1e-5)
    assert [[top["logprob"] for top in each["top_logprobs"]] for each in told] == [
        pytest.approx(list(entry.top.values()), abs=1e-5) for entry in entries
    ]
    streamed = events(client.post("/v1/responses", json=body | {"stream": True}).text)
    assert [each for name, data in streamed if name.endswith("delta") for each in data["logprobs"]] == told


def test_what_responses_cannot_do_is_refused_by_its_name(client):
    for name, value in [
        ("previous_response_id", "resp_1"),
        ("conversation", "c"),
        ("tools", [{"type": "web_search"}]),
        ("background", True),
        ("background", 0),
        ("truncation", "auto"),
        ("include", ["everything"]),
        ("max_output_tokens", 0),
        ("reasoning", {"effort": "high"}),
        ("no_such_field", 1),
    ]:
        response = client.post("/v1/responses", json={"input": "a", name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    for item, param in [
        ({"type": "function_call_output", "output": "1"}, "input[0].type"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[0].content[0].type"),
        ({"role": "robot", "content": "a"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
    ]:
        error = client.post("/v1/responses", json={"input": [item]}).json()["error"]
        assert error["param"] == param


def hidden(small: phi3_jax.Checkpoint, ids: list[int]) -> np.ndarray:
    """[T, D], without a cache, for texts of one length."""
    run = jax.jit(lambda tokens: Phi3(small.config).apply({"params": small.params}, tokens, method="hidden")[0])
    return np.asarray(run(jnp.asarray([ids], jnp.int32))[0], np.float64)


def test_embeddings_are_pooled_and_come_as_floats_or_bytes(client, small):
    text = "hello world, of 23 char"
    ids = small.tokenizer.encode(text)
    x = hidden(small, ids)
    mean = x.mean(axis=0) / np.linalg.norm(x.mean(axis=0))
    last = x[-1] / np.linalg.norm(x[-1])

    def ask(**fields):
        return client.post("/v1/embeddings", json={"model": "small", "input": text, **fields}).json()

    told = ask()
    np.testing.assert_allclose(told["data"][0]["embedding"], mean, atol=2e-6)
    assert told["usage"] == {"prompt_tokens": 23, "total_tokens": 23}
    np.testing.assert_allclose(ask(pooling="last")["data"][0]["embedding"], last, atol=2e-6)
    packed = base64.b64decode(ask(encoding_format="base64")["data"][0]["embedding"])
    assert np.frombuffer(packed, "<f4").tolist() == told["data"][0]["embedding"]
    several = ask(input=["a", text, ids])
    assert [each["index"] for each in several["data"]] == [0, 1, 2]
    assert several["data"][1]["embedding"] == several["data"][2]["embedding"] == told["data"][0]["embedding"]
    assert ask(input=ids)["data"][0]["embedding"] == told["data"][0]["embedding"]
    assert ask(input=list(map(float, ids)))["data"][0]["embedding"] == told["data"][0]["embedding"]


def test_embeddings_that_make_no_sense_are_refused(client):
    for fields, param in [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": 1}, "input"),
        ({"input": []}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": [97]}, "input"),
        ({"input": "a" * (ROOM + 1)}, "input"),
        ({"input": "a", "dimensions": 12}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ]:
        response = client.post("/v1/embeddings", json=fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), fields


def test_what_users_ask_is_in_the_log_only_if_it_shall_be(client, service, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "phi3_jax.serving")
    for wanted in (False, True):
        monkeypatch.setattr(service, "log_prompts", wanted)
        client.post("/v1/embeddings", json={"input": ["secret"]})
        assert ("secret" in str(caplog.records[-1].facts)) == wanted


def test_embeddings_have_as_long_as_answers(client, service, monkeypatch):
    turn = service.engine.turn
    monkeypatch.setattr(service.engine, "turn", lambda: time.sleep(0.05) or turn())
    monkeypatch.setattr(service, "limits", dataclasses.replace(service.limits, request_seconds=0.1))
    response = client.post("/v1/embeddings", json={"input": ["hello"] * 100})
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    wait_until(lambda: service.engine.statistics.embedding == 0, 5)


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("generate", {}, {"response": ""}),
        ("generate", {"prompt": "", "system": "Be brief", "raw": True}, {"response": ""}),
        ("chat", {"messages": []}, {"message": {"role": "assistant", "content": ""}}),
    ],
)
def test_ollamas_clients_may_ask_for_the_model_alone(client, path, fields, said):
    told = client.post(f"/api/{path}", json={"model": "small", **fields}).json()
    assert told | said | {"model": "small", "done": True, "done_reason": "load"} == told
    assert client.post(f"/api/{path}", json={"model": "other", **fields}).status_code == 404


@pytest.mark.slow
def test_ollama_streams_lines_and_answers_at_once(client, small, service, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "phi3_jax.serving")
    said = answer(small, "hello", 6).text
    chat = {"model": "small:latest", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 6}}
    response = client.post("/api/chat", json=chat)
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == said
    assert not any(line["done"] for line in lines)
    assert (last["done"], last["done_reason"], last["eval_count"], last["prompt_eval_count"]) == (True, "length", 6, 8)
    body = {"model": "small", "prompt": "hello", "stream": False, "options": {"num_predict": 6, "num_ctx": 2048}}
    whole = client.post("/api/generate", json=body).json()
    assert (whole["response"], whole["done"]) == (said, True)
    raw = client.post("/api/generate", json=body | {"raw": True}).json()
    expected = answer(small, small.tokenizer.encode("hello"), 6).text
    assert raw["response"] == expected != said
    assert [each["name"] for each in client.get("/api/tags").json()["models"]] == ["small"]
    assert service.log_prompts is False
    facts = [record.facts for record in caplog.records if getattr(record, "facts", {}).get("path") == "/api/chat"]
    assert {name: facts[-1][name] for name in ("model", "prompt_tokens", "completion_tokens", "finish")} == {
        "model": "small:latest",
        "prompt_tokens": 8,
        "completion_tokens": 6,
        "finish": "length",
    }
    assert "prompts" not in facts[-1]
    monkeypatch.setattr(service, "log_prompts", True)
    client.post("/api/generate", json=body)
    assert caplog.records[-1].facts["prompts"] == ([{"role": "user", "content": "hello"}],)
    wrong = client.post("/api/chat", json=chat | {"model": "other"})
    assert (wrong.status_code, "there is no model 'other'" in wrong.json()["error"]) == (404, True)


def numbers(client: TestClient) -> dict[str, float]:
    """All samples of /metrics, by name and labels."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.mark.slow
def test_metrics_count_known_requests(client, small):
    before = numbers(client)
    for text in ("hello", "you"):
        client.post("/v1/responses", json={"input": text, "max_output_tokens": 5})
    client.post("/v1/responses", json={"input": 1})
    client.post("/v1/embeddings", json={"input": "hello"})
    client.get("/no/such/path")
    after = numbers(client)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew('phi3_requests_total{endpoint="/v1/responses",status="200"}') == 2
    assert grew('phi3_requests_total{endpoint="/v1/responses",status="400"}') == 1
    assert grew('phi3_requests_total{endpoint="other",status="404"}') == 1
    assert grew('phi3_request_seconds_count{endpoint="/v1/responses"}') == 3
    assert grew('phi3_answers_total{finish_reason="length"}') == 2
    assert grew("phi3_answer_tokens_total") == 10
    assert grew("phi3_prompt_tokens_total") == 8 + 6
    assert grew("phi3_embedded_tokens_total") == 5
    for name in ("queue", "time_to_first_token", "time_per_token", "answer"):
        assert grew(f"phi3_{name}_seconds_count") == 2, name
    waits = [grew(f"phi3_{name}_seconds_sum") for name in ("queue", "time_to_first_token", "answer")]
    assert 0 < waits[0] < waits[1] < waits[2]
    assert grew("phi3_time_per_token_seconds_sum") * 4 == pytest.approx(waits[2] - waits[1], rel=0.2)
    assert (after["phi3_slots"], after["phi3_queue"], after["phi3_reading"], after["phi3_writing"]) == (1, 0, 0, 0)
    assert after[f'phi3_build_info{{jax="{jax.__version__}",model="small",version="0.1.0"}}'] == 1


def test_metrics_count_what_is_compiled(client):
    before = numbers(client)["phi3_compilations_total"]
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert numbers(client)["phi3_compilations_total"] > before

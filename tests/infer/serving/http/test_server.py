"""The server with a small model, beside `generate`, over a real connection."""

import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time

import httpx
import pytest
from adapters import dense, random_adapter, scalings
from servers import HI, TOOL, ask, is_idle, serving, small_service, wait_until, working

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import save_adapter
from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.serving.engine import Engine, Job, QueueFull
from phi3_jax.infer.serving.http.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

ROOM = 128
GREEDY = Sampling()
LORA = LoraConfig(3, 6.0)


@pytest.fixture(scope="module")
def service(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    save_adapter(folder / "law", random_adapter(tiny.config, LORA, 1), LORA, tiny.config, "base")
    with working(small_service(tiny, folder / "tokenizer", ROOM, {"law": folder / "law"})) as it:
        yield it


@pytest.fixture(scope="module")
def client(service):
    with serving(service) as url, httpx.Client(base_url=url, timeout=20) as it:
        yield it


def expected(service, prompt, most=8, sampling=GREEDY, params=None):
    """What `generate` writes. Always with log-probabilities, so that there is one program for all of it."""
    ids = prompt if isinstance(prompt, list) else service.tokenizer.encode(prompt, add_eos=False)
    options = Options(room=ROOM, prefill_chunk=16, logprobs=2, echo=True)
    checkpoint = dataclasses.replace(service.checkpoint, params=params or service.checkpoint.params)
    return generate(checkpoint, ids, max_new_tokens=most, sampling=sampling, options=options)[0]


def chat_ids(service, messages=HI, **options):
    return phi3_jax.encode_chat(service.tokenizer, messages, **options)


def events(client, path="/v1/chat/completions", **fields):
    """The chunks of a stream, which ends as it should."""
    fields = {"stream": True, "temperature": 0, "max_tokens": 8, **fields}
    if path.endswith("chat/completions"):
        fields = {"messages": HI, **fields}
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
    assert found[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in found[:-1]]


def test_a_message_is_what_generate_writes(service, client):
    reply = ask(client, logprobs=True, top_logprobs=2)
    wanted = expected(service, chat_ids(service))
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert (choice["finish_reason"], len(wanted.token_ids)) == ("length", 8)
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == wanted.text
    assert [entry["logprob"] for entry in entries] == pytest.approx(
        [each.logprob for each in wanted.logprobs], abs=1e-5
    )
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 8
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]


def test_a_stream_says_the_same_and_ends_with_the_usage(client):
    reply = ask(client, n=2, temperature=1, seed=3, logprobs=True)
    *chunks, last = events(client, n=2, temperature=1, seed=3, logprobs=True, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 16)
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(reply["choices"]):
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(each["delta"].get("content", "") for each in mine) == choice["message"]["content"]
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == ["length"]
        entries = [entry for each in mine if each["logprobs"] for entry in each["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == [e["token"] for e in choice["logprobs"]["content"]]
    assert reply["choices"][0]["message"] != reply["choices"][1]["message"]


def test_options_of_sampling_reach_the_model(service, client):
    options = {"temperature": 0.7, "top_k": 11, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 1.5, "seed": 2**32 + 5}
    options |= {"frequency_penalty": -1, "repetition_penalty": 1.3, "logit_bias": {"7": 3.5}, "min_tokens": 2}
    sampling = Sampling(
        temperature=0.7,
        top_k=11,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=1.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.3,
        logit_bias={7: 3.5},
        min_new_tokens=2,
        seed=5,
    )
    reply = ask(client, n=2, **options)
    for index, choice in enumerate(reply["choices"]):
        wanted = expected(service, chat_ids(service), 8, dataclasses.replace(sampling, seed=5 + index))
        assert choice["message"]["content"] == wanted.text


def test_what_a_request_leaves_open_is_the_services_and_seeds_differ(client):
    asked = {"messages": HI, "min_tokens": ROOM}
    first, second = (client.post("/v1/chat/completions", json=asked).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] == ROOM - 5
    assert first["choices"][0]["message"] != second["choices"][0]["message"]


def test_the_model_that_a_request_names_is_an_adapter_or_the_model_itself(service, client):
    made = random_adapter(service.checkpoint.config, LORA, 1)
    merged = dense(service.checkpoint.params, made, LORA, scalings(LORA))
    found = [ask(client, model=name) for name in ("small", "law")]
    wanted = [expected(service, chat_ids(service), params=params).text for params in (None, merged)]
    assert [each["choices"][0]["message"]["content"] for each in found] == wanted
    assert [each["model"] for each in found] == ["small", "law"]
    assert wanted[0] != wanted[1]
    described = client.get("/v1/models/law").json()
    assert (described["root"], described["parent"]) == ("small", "small")


def test_a_stop_string_ends_an_answer_and_is_not_in_it(service, client):
    text = expected(service, chat_ids(service)).text
    choice = ask(client, stop=["never", text[3:5]])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.find(text[3:5])], "stop")


def test_parts_and_roles_are_read_as_the_template_wants_them(service, client):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    before = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B", "refusal": None}]
    reply = ask(client, messages=[*before, {"role": "user", "content": parts}])
    assert reply["choices"][0]["message"]["content"] == expected(service, chat_ids(service, [*before, *HI])).text


def test_answers_fit_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    choice = ask(client, response_format=form, max_tokens=60)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["a"] in (1, 2)
    for form, answers in (
        ({"regex": "[ab]{3}c"}, {"aaac", "aabc", "abac", "abbc", "baac", "babc", "bbac", "bbbc"}),
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
    ):
        assert ask(client, structured_outputs=form)["choices"][0]["message"]["content"] in answers
    assert ask(client, response_format={"type": "json_object"})["choices"][0]["message"]["content"][0] == "{"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_that_are_required_come_whole_and_as_deltas(client, choice):
    asked = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 80}
    reply = ask(client, **asked)["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    (call,) = reply["message"]["tool_calls"]
    assert reply["message"]["content"] is None
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"])["x"] in (1, 23)
    deltas = [each["choices"][0]["delta"] for each in events(client, **asked)]
    head, rest = (delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta)
    assert (head["index"], head["function"]) == (0, {"name": "add", "arguments": ""})
    assert rest["function"]["arguments"] == call["function"]["arguments"]


@pytest.mark.parametrize("echo", [False, True])
def test_completions_are_what_generate_writes(service, client, echo):
    prompts = ["Hello", "ab c"]
    reply = ask(client, "/v1/completions", prompt=prompts, max_tokens=6, temperature=0, logprobs=1, echo=echo)
    for index, (prompt, choice) in enumerate(zip(prompts, reply["choices"], strict=True)):
        wanted = expected(service, prompt, 6)
        entries = [*(wanted.prompt_logprobs if echo else []), *wanted.logprobs]
        assert (choice["index"], choice["text"]) == (index, (prompt if echo else "") + wanted.text)
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["text_offset"] == list(range(len(entries)))
        assert found["token_logprobs"] == [
            None if each.logprob is None else pytest.approx(each.logprob, abs=1e-5) for each in entries
        ]
        assert [top and len(top) for top in found["top_logprobs"]] == [each.logprob and 1 for each in entries]
    assert reply["usage"]["prompt_tokens"] == 9


def test_a_prompt_alone_comes_back_with_its_logprobs(service, client):
    ids = service.tokenizer.encode("Hello")
    fields = {"prompt": [ids], "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    reply = ask(client, "/v1/completions", **fields)
    assert reply["choices"][0]["text"] == "Hello"
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 5
    assert reply["usage"]["completion_tokens"] == 0


def test_streamed_completions_say_the_same(client):
    fields = {
        "prompt": ["Hello", "ab"],
        "max_tokens": 5,
        "n": 2,
        "seed": 1,
        "temperature": 1,
        "echo": True,
        "logprobs": 0,
    }
    reply = ask(client, "/v1/completions", **fields)
    chunks = events(client, "/v1/completions", **fields)
    for choice in reply["choices"]:
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        offsets = [offset for each in mine for offset in each["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


def test_tokens_that_were_known_are_those_of_all_prompts_each_counted_once(client):
    fields = {"prompt": ["known one " * 4, "another is known " * 3], "n": 2, "max_tokens": 1}
    for known in (0, 32 + 48):  # whole pieces of 16, without the last token
        reply = ask(client, "/v1/completions", **fields)
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": known}


def test_the_best_of_several_comes_back(service, client):
    fields = {"prompt": "Hello", "max_tokens": 6, "temperature": 1, "seed": 4}
    found = ask(client, "/v1/completions", best_of=4, **fields)
    runs = [expected(service, "Hello", 6, Sampling(temperature=1.0, seed=4 + i)) for i in range(4)]
    best = max(runs, key=lambda run: sum(each.logprob for each in run.logprobs) / len(run.logprobs))
    assert [choice["text"] for choice in found["choices"]] == [best.text]
    assert found["choices"][0]["logprobs"] is None
    assert found["usage"]["completion_tokens"] == sum(len(run.token_ids) for run in runs)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slot_at_once(service, client, stream):
    wait_until(lambda: is_idle(service))
    ended = service.engine.statistics.finished.get("interrupt", 0)
    host, port = client.base_url.host, client.base_url.port
    body = json.dumps({"messages": HI, "n": 3, "max_tokens": 120, "stream": stream, "min_tokens": 120})
    with socket.create_connection((host, port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: service.engine.statistics.writing > 0)
    wait_until(lambda: is_idle(service), 2)
    assert service.engine.statistics.finished["interrupt"] >= ended + 2
    assert not service._open


def test_a_full_queue_is_told_to_try_again(service, client):
    wait_until(lambda: is_idle(service))
    go_on = threading.Event()
    with contextlib.suppress(QueueFull):
        while True:
            service.engine.submit(Job([5], 2), lambda piece: go_on.wait(10))
    response = client.post("/v1/chat/completions", json={"messages": HI})
    go_on.set()
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["type"] == "rate_limit_error"
    wait_until(lambda: is_idle(service))


def test_an_answer_ends_when_its_time_is_over(service, client, monkeypatch):
    turn = service.engine.turn
    monkeypatch.setattr(service.engine, "turn", lambda: time.sleep(0.03) or turn())
    monkeypatch.setattr(service, "limits", dataclasses.replace(service.limits, request_seconds=0.08))
    response = client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 120, "min_tokens": 120})
    if response.status_code == 200:
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert response.json()["usage"]["completion_tokens"] < 120
    else:  # it had not even begun
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")


def test_the_log_says_what_happened_but_not_what_was_said(client, caplog):
    caplog.set_level(logging.DEBUG, "phi3_jax.serving")
    secret = [{"role": "user", "content": "my secret"}]
    response = client.post("/v1/chat/completions", json={"messages": secret, "max_tokens": 3, "min_tokens": 3})
    wait_until(lambda: caplog.records)
    facts = caplog.records[-1].facts
    assert response.headers["x-request-id"] == facts["id"]
    assert {name: facts[name] for name in ("status", "model", "prompt_tokens", "completion_tokens", "finish")} == {
        "status": 200,
        "model": "small",
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "finish": ["length"],
    }
    assert "secret" not in str([record.__dict__ for record in caplog.records])


def test_an_engine_that_dies_is_told_to_whoever_waits(service):
    """A service of its own, whose engine fails in the middle."""
    engine = Engine(service.checkpoint, service.engine.options)
    other = Service(engine, service.checkpoint, "other")
    told = []
    other.on_failure = lambda: told.append(other.failure)

    engine.warm_up = lambda told: None
    with working(other), serving(other) as url, httpx.Client(base_url=url) as client:
        engine.turn = lambda: 1 / 0
        response = client.post("/v1/chat/completions", json={"messages": HI})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        wait_until(lambda: told)
        assert told == ["ZeroDivisionError: division by zero"]
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        assert client.post("/v1/chat/completions", json={"messages": HI}).status_code == 503

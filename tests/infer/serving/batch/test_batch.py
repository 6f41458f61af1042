"""Files of requests through the engine, in both forms: each answer is that of plain generation alone."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from spoiled import with_bytes

from phi3_jax.infer import Grammar, Options, Sampling, generate
from phi3_jax.infer.serving.batch import Defaults, answer_all
from phi3_jax.infer.serving.batch.answering import Shared
from phi3_jax.infer.serving.batch.json_lines import open_file
from phi3_jax.infer.serving.batch.openai_form import answer_lines, is_openai, read_api_requests
from phi3_jax.infer.serving.batch.workers import Plan, Worker
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job
from phi3_jax.model import Phi3

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOTS, CHUNK = 2, 16


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """A tiny model that reads and writes bytes."""
    return with_bytes(tiny, tmp_path_factory.mktemp("tokenizer"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def engine(small):
    return new_engine(small)


def new_engine(small):
    return Engine(small, EngineOptions(SLOTS, 64, queue=400, chunk=CHUNK, top_logprobs=2))


def jobs_of(small, count):
    for i in range(count):
        prompt = small.tokenizer.encode("the cat sat on the mat " * (i % 3) + f"{i}")
        yield i, Job(prompt, 3 + 5 * i % 11, Sampling(temperature=i % 2, seed=i))


def alone(small, job):
    options = Options(prefill_chunk=CHUNK)
    (answer,) = generate(small, [job.prompt], job.max_new_tokens, sampling=job.sampling, options=options)
    return answer.token_ids, answer.text, answer.finish_reason


def test_jobs_are_answered_as_alone_and_as_they_end(small, engine):
    jobs = {-1: Job([5, 6, 7], 57), **dict(jobs_of(small, 11))}  # the first of more tokens than all others
    answers = dict(answer_all(engine, jobs.items()))
    assert sorted(answers) == list(jobs)
    assert list(answers) != list(jobs)
    for key, answer in answers.items():
        assert (answer.token_ids, answer.text, answer.finish_reason) == alone(small, jobs[key])
    assert (engine.statistics.waiting, engine.statistics.reading, engine.statistics.writing) == (0, 0, 0)


def test_only_so_many_jobs_are_under_way_as_there_are_slots(small, engine):
    handed_over = 0

    def jobs():
        nonlocal handed_over
        for key, job in jobs_of(small, 9):
            handed_over += 1
            yield key, job

    ended = 0
    for _ in answer_all(engine, jobs()):
        ended += 1
        assert handed_over <= ended + SLOTS
    assert ended == handed_over == 9


def test_what_is_under_way_ends_when_nobody_wants_it(small, engine):
    long = Job([5, 6, 7], 57)  # of more tokens than a call writes
    answers = answer_all(engine, [*jobs_of(small, 1), *((key, long) for key in range(1, 4))])
    assert next(answers)[0] == 0
    before = engine.statistics.finished.get("interrupt", 0)
    answers.close()
    while engine.turn():
        pass
    assert engine.statistics.finished["interrupt"] - before == SLOTS - 1


def test_threads_share_an_engine_and_its_slots(small, engine, monkeypatch):
    shared, found, waiting = Shared(engine), {}, []

    def turn(real=engine.turn):
        was_anything = real()
        waiting.append(engine.statistics.waiting)
        return was_anything

    def answer(begin):
        some = [(key, job) for key, job in jobs_of(small, 12) if key % 2 == begin]
        found.update(answer_all(shared, some))

    monkeypatch.setattr(engine, "turn", turn)

    threads = [threading.Thread(target=answer, args=[begin]) for begin in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(waiting) == {0}  # a deadline would run meanwhile
    assert {key: each.token_ids for key, each in found.items()} == {
        key: alone(small, job)[0] for key, job in jobs_of(small, 12)
    }


def test_an_engine_that_has_failed_has_answered_nothing(small, monkeypatch):
    broken = new_engine(small)
    shared = Shared(broken)
    answers = answer_all(shared, [*jobs_of(small, 1), (1, Job([5, 6, 7], 57)), (2, Job([5, 6], 57))])
    next(answers)

    def fail():
        raise MemoryError("no memory")

    monkeypatch.setattr(broken, "_write", fail)
    with pytest.raises(MemoryError):  # in the turn of another thread
        shared.turn()
    with pytest.raises(RuntimeError, match="the engine has failed"):
        next(answers)
    with pytest.raises(RuntimeError, match="the engine has failed"):
        list(answer_all(shared, jobs_of(small, 1)))


def test_a_job_that_cannot_be_carried_out_costs_no_other_its_answer(small, engine):
    bad = {7: Job([], 3), 8: Job([5], 3, grammar=Grammar.regex("(")), 9: Job([5], 3, logprobs=9)}
    answers = dict(answer_all(engine, [*bad.items(), *jobs_of(small, 4)]))
    assert sorted(answers) == [0, 1, 2, 3, 7, 8, 9]
    for key, why in ((7, "no tokens"), (8, "regex"), (9, "logprobs=9 must be")):
        assert (answers[key].text, answers[key].token_ids, answers[key].finish_reason) == ("", [], "error")
        assert why in answers[key].error
    for key, job in jobs_of(small, 4):
        assert answers[key].token_ids == alone(small, job)[0]
    assert (engine.statistics.reading, engine.statistics.writing) == (0, 0)


# OpenAI's form.


def api_line(name, url="/v1/completions", **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m", "max_tokens": 9, **body}}


def api_file(folder, *lines):
    path = folder / "api.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_file(path)


def test_lines_in_openais_form_are_answered_as_alone(small, engine, tmp_path):
    lines = [
        api_line("greedy", prompt="the cat", temperature=0),
        api_line("drawn", prompt="the dog"),  # at a temperature of 1, with seed + 1
        api_line("seeded", prompt="the dog", seed=7, top_p=0.5),
        api_line("several", prompt=["the", "dog"], n=2, temperature=0.7, seed=3),
        api_line("wrong", promt="the cat"),
        api_line("long", prompt="the cat sat on the mat " * 20, temperature=0),
        api_line("seedy", prompt="the other", temperature=0, seed=-1.5),
    ]
    file = api_file(tmp_path, *lines)
    assert is_openai(file)
    requests = read_api_requests(file, 2**32 - 1)
    assert [request.body.get("seed") for request in requests[:4]] == [2**32 - 1, 0, 7, 3]
    assert requests[0].kept == {"custom_id": "greedy"}
    answers = dict(answer_lines(small, engine, [(request.custom_id, request) for request in requests]))
    assert answers.keys() == {line["custom_id"] for line in lines}
    assert len({answer["id"] for answer in answers.values()}) == len(lines)
    assert all(answer["error"] is None and answer["response"]["request_id"] for answer in answers.values())
    statuses = {name: answer["response"]["status_code"] for name, answer in answers.items()}
    refused = dict.fromkeys(["wrong", "long", "seedy"], 400)
    assert statuses == {line["custom_id"]: 200 for line in lines} | refused
    bodies = {name: answer["response"]["body"] for name, answer in answers.items()}
    assert bodies["wrong"]["error"]["param"] == "prompt"
    assert bodies["long"]["error"]["code"] == "context_length_exceeded"
    assert "seed" in bodies["seedy"]["error"]["message"]

    def text(prompt, **sampling):
        job = Job(small.tokenizer.encode(prompt), 9, Sampling(**sampling))
        return alone(small, job)[1]

    assert bodies["greedy"]["choices"][0]["text"] == text("the cat")
    assert bodies["drawn"]["choices"][0]["text"] == text("the dog", temperature=1.0, seed=0)
    assert bodies["seeded"]["choices"][0]["text"] == text("the dog", temperature=1.0, seed=7, top_p=0.5)
    assert [choice["text"] for choice in bodies["several"]["choices"]] == [
        text(prompt, temperature=0.7, seed=seed) for prompt in ("the", "dog") for seed in (3, 4)
    ]
    assert bodies["several"]["usage"]["completion_tokens"] > 9


def test_embeddings_in_openais_form_are_pooled_hidden_states(small, engine, tmp_path):
    texts, ids = ["the cat sat on the mat", "dog"], small.tokenizer.encode("the other")
    lines = [
        {**api_line("texts", "/v1/embeddings"), "body": {"input": texts}},
        {**api_line("last", "/v1/embeddings"), "body": {"input": ids, "pooling": "last", "seed": 1}},
        {**api_line("wrong", "/v1/embeddings"), "body": {"input": []}},
    ]
    requests = read_api_requests(api_file(tmp_path, *lines), 3)
    assert "seed" not in requests[0].body
    answers = dict(answer_lines(small, engine, [(request.custom_id, request) for request in requests]))
    assert {name: answer["response"]["status_code"] for name, answer in answers.items()} == {
        "texts": 200,
        "last": 400,  # nothing is drawn
        "wrong": 400,
    }
    hidden = jax.jit(lambda *args: Phi3(small.config).apply({"params": small.params}, *args, method="hidden")[0])
    for text, found in zip(texts, answers["texts"]["response"]["body"]["data"], strict=True):
        tokens = small.tokenizer.encode(text, add_eos=False)
        vector = np.asarray(hidden(np.array([tokens]), np.arange(len(tokens))[None])[0], np.float64).mean(axis=0)
        np.testing.assert_allclose(found["embedding"], vector / np.linalg.norm(vector), atol=2e-6)


def test_lines_of_a_failed_engine_have_no_answers(small, tmp_path, monkeypatch):
    broken = new_engine(small)

    def fail():
        raise MemoryError("no memory")

    monkeypatch.setattr(broken, "_write", fail)
    requests = read_api_requests(api_file(tmp_path, *(api_line(f"{i}", prompt="the cat") for i in range(5))), 0)
    answered = []
    with pytest.raises(MemoryError, match="no memory"):
        answered.extend(answer_lines(small, broken, list(enumerate(requests))))
    assert answered == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"custom_id": "a"}, r"\['body', 'method', 'url'\] are missing"),
        ({**api_line("a"), "prompt": "x"}, r"\['prompt'\] are missing, or unknown"),
        ({**api_line("a"), "custom_id": 1}, "custom_id=1 must be a text"),
        ({**api_line("a"), "custom_id": ""}, "custom_id="),
        ({**api_line("a"), "method": "GET"}, 'method="GET" must be "POST"'),
        (api_line("a", "/v1/models"), "url=.* must be one of /v1/chat/completions, /v1/completions"),
        (api_line("a", ["/v1/completions"]), "url=.* must be one of"),
        ({**api_line("a"), "body": []}, r"body=\[\] must be an object"),
        (api_line("a", stream=True), "stream=true: answers in a file are not streamed"),
        (api_line("a", model=3), "model=3 must be a text"),
        (api_line("a", model="other"), r'one model, not for "m" \(line 1\) and "other" \(line 2\)'),
        (api_line("first"), 'custom_id="first" is the id of line 1, too'),
    ],
)
def test_lines_in_openais_form_are_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"api\.jsonl:2: .*{message}"):
        read_api_requests(api_file(tmp_path, api_line("first"), line), 0)


# What a machine of a cluster does.


def test_a_worker_answers_rows_of_both_forms(small, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_jax.infer.serving.batch.workers.load", lambda path: {"here": small}[path])
    worker = Worker(Plan({"path": "here"}, Defaults(6), Sampling(temperature=0.5, seed=11), SLOTS, CHUNK))
    rows = [
        (2, 0, {"prompt": "the cat"}, False),
        (2, 5, {"prompt": "the cat", "max_new_tokens": 3}, False),
        (3, 5, api_line("a", prompt="the cat", temperature=0.5), True),
        (4, 1, {"prompt": "the cat sat on the mat " * 20}, False),
        (5, 5, api_line("a", prompt="the cat", temperature=0.5, model="of another file"), True),
    ]
    block = {
        "file": [file for file, _, _, _ in rows],
        "index": [index for _, index, _, _ in rows],
        "line": [index + 1 for _, index, _, _ in rows],
        "request": [json.dumps(fields) for _, _, fields, _ in rows],
        "is_openai": [is_theirs for _, _, _, is_theirs in rows],
    }
    answered = worker(block)
    assert (answered["file"], answered["index"]) == (block["file"], block["index"])
    first, second, third, fourth, fifth = map(json.loads, answered["answer"])
    prompt = small.tokenizer.encode("the cat")
    assert first["token_ids"] == alone(small, Job(prompt, 6, Sampling(temperature=0.5, seed=11)))[0]
    assert second["token_ids"] == alone(small, Job(prompt, 3, Sampling(temperature=0.5, seed=16)))[0]
    expected = alone(small, Job(prompt, 9, Sampling(temperature=0.5, seed=16)))[1]
    for answer in (third, fifth):
        assert answer["response"]["body"]["choices"][0]["text"] == expected
    assert (fourth["finish_reason"], fourth["token_ids"]) == ("error", [])
    assert "leaves no room for an answer" in fourth["error"]


def test_a_worker_answers_blocks_at_the_same_time(small, monkeypatch):
    """As Ray's threads ask it to; each block is longer than there are slots, and has rows of both forms."""
    monkeypatch.setattr("phi3_jax.infer.serving.batch.workers.load", lambda path: small)
    worker = Worker(Plan({"path": "here"}, Defaults(6), Sampling(temperature=0.5), SLOTS, CHUNK))

    def block(begin):
        theirs = [index % 3 == 0 for index in range(begin, begin + 12)]
        lines = [
            api_line("a", prompt="the cat", temperature=0.5, max_tokens=6) if is_theirs else {"prompt": "the cat"}
            for is_theirs in theirs
        ]
        columns = {"file": [0] * 12, "index": list(range(begin, begin + 12)), "line": list(range(12))}
        return {**columns, "request": list(map(json.dumps, lines)), "is_openai": theirs}

    with ThreadPoolExecutor(2) as pool:
        answered = list(pool.map(worker, [block(0), block(12)], timeout=60))
    texts = []
    for answer in (json.loads(answer) for block in answered for answer in block["answer"]):
        texts.append(answer["text"] if "text" in answer else answer["response"]["body"]["choices"][0]["text"])
    prompt = small.tokenizer.encode("the cat")
    for index in (0, 1, 2, 11, 12, 15, 23):
        assert texts[index] == alone(small, Job(prompt, 6, Sampling(temperature=0.5, seed=index)))[1]

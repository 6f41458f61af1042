"""Files of requests through the engine, in both forms: each answer is that of plain generation for its request alone."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from generate_program import in_process
from spoiled import with_bytes

import phi3_jax
from phi3_jax.infer import Grammar, Options, Sampling, generate
from phi3_jax.infer.serving.batch import Defaults, answer_all
from phi3_jax.infer.serving.batch.json_lines import open_file
from phi3_jax.infer.serving.batch.openai_form import answer_lines, is_openai, lengths_of, read_api_requests
from phi3_jax.infer.serving.batch.workers import Plan, Worker
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOTS, CHUNK = 3, 16


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """A tiny model that reads and writes bytes."""
    return with_bytes(tiny, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(small):
    return Engine(small, EngineOptions(SLOTS, 64, queue=400, chunk=CHUNK, top_logprobs=2))


def jobs_of(small, count):
    for i in range(count):
        prompt = small.tokenizer.encode("the cat sat on the mat " * (i % 3) + f"{i}")
        yield i, Job(prompt, 3 + 5 * i % 11, Sampling(temperature=i % 2, seed=i), ("o",) if i % 5 == 4 else ())


def alone(small, job):
    options = Options(prefill_chunk=CHUNK)
    (answer,) = generate(small, [job.prompt], job.max_new_tokens, sampling=job.sampling, stop=job.stop, options=options)
    return answer.token_ids, answer.text, answer.finish_reason


def test_jobs_are_answered_as_alone_and_as_they_end(small, engine):
    jobs = dict(jobs_of(small, 11))
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
    answers = answer_all(engine, jobs_of(small, 9))
    next(answers)
    before = engine.statistics.finished.get("interrupt", 0)
    answers.close()
    while engine.turn():
        pass
    assert engine.statistics.finished["interrupt"] - before == SLOTS - 1


def test_threads_share_an_engine(small, engine):
    turns, found = threading.Lock(), {}

    def answer(begin):
        some = [(key, job) for key, job in jobs_of(small, 12) if key % 2 == begin]
        found.update(answer_all(engine, some, turns))

    threads = [threading.Thread(target=answer, args=[begin]) for begin in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: each.token_ids for key, each in found.items()} == {
        key: alone(small, job)[0] for key, job in jobs_of(small, 12)
    }

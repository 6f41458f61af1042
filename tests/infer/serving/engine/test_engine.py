"""Jobs in a crowd beside the plain `generate` of each alone, whatever else is under way, comes or goes."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from chats import END, small_chat

import phi3_jax
from phi3_jax.infer import Generation, Grammar, Options, Sampling, generate
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job, Piece, QueueFull, Ticket

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOM = 64
SMALL = EngineOptions(slots=2, room=ROOM, queue=64, chunk=16, top_logprobs=2)


@pytest.fixture(scope="module")
def small(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    """With a tokenizer and an end token; LongRoPE's border is at 16 and the window 19."""
    return small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))


class Listener:
    """Joins what it is told."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, piece: Piece) -> None:
        assert not self.pieces or self.pieces[-1].finish_reason is None
        self.pieces.append(piece)

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def logprobs(self) -> list:
        return [entry for piece in self.pieces for entry in piece.logprobs or []]


def submit(engine: Engine, jobs: Sequence[Job]) -> list[tuple[Job, Ticket, Listener]]:
    asked = []
    for job in jobs:
        listener = Listener()
        asked.append((job, engine.submit(job, listener), listener))
    return asked


def finish(engine: Engine) -> None:
    while engine.turn():
        pass


def nothing_is_left(engine: Engine, jobs: int) -> None:
    counts = engine.statistics
    assert (counts.waiting, counts.reading, counts.writing, engine._taken) == (0, 0, 0, 0)
    assert not engine._rows
    assert not engine._readers
    assert not engine._batch.used
    assert len(engine._scheduler) == 0
    assert sum(counts.finished.values()) == jobs


def alone(model: phi3_jax.Checkpoint, job: Job) -> Generation:
    limit = min(job.max_new_tokens, ROOM - len(job.prompt))
    # What is recorded changes no token, and all share their programs.
    options = Options(logprobs=2, echo=True, room=ROOM)
    (expected,) = generate(
        model, [job.prompt], limit, sampling=job.sampling, stop=job.stop, grammar=job.grammar, options=options
    )
    return expected


def close(found: Sequence, expected: Sequence, most: int) -> None:
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert len(one.top) == (0 if other.logprob is None else most)
        if other.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=2e-5)
            assert list(one.top.values()) == pytest.approx(list(other.top.values())[:most], abs=2e-5)


def equals(job: Job, ticket: Ticket, found: Listener, expected: Generation) -> None:
    assert (found.ids, found.text, found.reason) == (expected.token_ids, expected.text, expected.finish_reason)
    if job.logprobs is None:
        assert all(piece.logprobs is None for piece in found.pieces)
    else:
        close(found.logprobs, expected.logprobs, job.logprobs)
    if job.echo:
        close(ticket.prompt_logprobs, expected.prompt_logprobs, job.logprobs)
    else:
        assert ticket.prompt_logprobs is None


def prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 94, length).tolist() for length in lengths]


def test_answers_are_those_of_each_alone(tiny, monkeypatch):
    """Past LongRoPE's border at 16 tokens, which two cross at once; one is just at it; three wait for a slot.

    The first two have one prompt, which is read once.
    """
    jobs = [Job(prompt, 12) for prompt in prompts(3, [7, 7, 16, 29])]
    jobs.insert(1, dataclasses.replace(jobs[0], sampling=Sampling(1.0, seed=5)))
    engine, read, pieces = Engine(tiny, SMALL), decoding.read, []
    monkeypatch.setattr(decoding, "read", lambda *args: pieces.append(args[5]) or read(*args))
    asked = submit(engine, jobs)
    finish(engine)
    mine = list(pieces)
    for job, _, found in asked:
        (expected,) = generate(tiny, [job.prompt], 12, sampling=job.sampling, options=Options(room=ROOM))
        assert (found.ids, found.reason) == (expected.token_ids, "length")
    nothing_is_left(engine, 5)
    assert len(mine) == 5 - 1 + 1 + 4 * 2  # each once, but two together; one of two pieces; four again, of two pieces
    assert engine.statistics.answer_tokens == 5 * 12
    assert engine.statistics.prompt_tokens == sum(len(job.prompt) for job in jobs)


def mixed() -> list[Job]:
    """Lengths from 1 past several chunks, in a room that some fill."""
    lengths = [1, 15, 16, 17, 8, 40, 3, 31, 12, 5, 63, 20, 9, 7, 33, 16, 2, 14, 25, 48]
    jobs = [Job(prompt, 10) for prompt in prompts(0, lengths)]

    def change(number: int, **fields: object) -> None:
        jobs[number] = dataclasses.replace(jobs[number], **fields)

    drawn = Sampling(1.2, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3, no_repeat_ngram_size=3, seed=7)
    change(0, max_new_tokens=30, logprobs=2, echo=True)
    change(1, sampling=drawn, max_new_tokens=20)
    change(2, sampling=dataclasses.replace(drawn, seed=8), logprobs=1)
    change(3, logprobs=0, echo=True)
    change(4, grammar=Grammar.regex("[a-z]{4,9}"), sampling=Sampling(1.0, seed=3), max_new_tokens=20)
    change(5, max_new_tokens=100)
    change(6, sampling=Sampling(logit_bias={END: 8.0}))
    change(7, max_new_tokens=1)
    change(8, sampling=Sampling(1.0, seed=4, logit_bias=dict.fromkeys(range(60), 1.0)))
    change(9, stop=tuple("eaiou"), sampling=Sampling(1.0, seed=9), max_new_tokens=30)
    change(11, grammar=Grammar.choice(["yes", "no"]), logprobs=2)
    change(12, sampling=Sampling(banned_tokens=range(40), forced_tokens=[70, 71]))
    change(13, sampling=Sampling(1.5, seed=1, min_new_tokens=9, logit_bias={END: 9.0}))
    change(14, echo=True, logprobs=1, max_new_tokens=1)
    return jobs


@pytest.mark.slow
def test_mixed_jobs_in_every_order_are_those_of_each_alone(small):
    """With some that are cancelled, or late, or whose listener is gone, among them; rows are copied chunk by chunk."""
    jobs = mixed()
    expected = [alone(small, job) for job in jobs]
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    engine = Engine(small, dataclasses.replace(SMALL, slots=3))
    for order in (range(len(jobs)), reversed(range(len(jobs))), np.random.default_rng(1).permutation(len(jobs))):
        numbers = [int(number) for number in order]
        asked = submit(engine, [jobs[number] for number in numbers])
        cancelled, heard = Listener(), []
        victim = engine.submit(jobs[5], cancelled)
        late, gone, told = Listener(), [], Listener()
        engine.submit(dataclasses.replace(jobs[5], seconds=0.0), late)

        def leaves(piece: Piece, gone: list = gone) -> None:
            gone.append(piece)
            raise BrokenPipeError

        engine.submit(jobs[0], leaves)
        never = engine.submit(jobs[1], told)
        engine.cancel(never)
        while engine.turn():
            if cancelled.ids and not heard:
                heard = list(cancelled.ids)
                engine.cancel(victim)
        for number, (job, ticket, found) in zip(numbers, asked, strict=True):
            equals(job, ticket, found, expected[number])
        assert (cancelled.reason, late.reason, told.reason) == ("interrupt", "deadline", "interrupt")
        assert cancelled.ids == heard == expected[5].token_ids[: len(heard)]
        assert len(gone) == 1
        assert (late.ids, told.ids) == ([], [])
    nothing_is_left(engine, 3 * 24)
    assert engine.statistics.finished["interrupt"] == 9
    assert engine.statistics.finished["deadline"] == 3
    told = sum(len(answer.token_ids) for answer in expected)
    assert engine.statistics.answer_tokens >= 3 * (told + 1)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(small):
    """Whatever is asked for: log-probabilities, grammars, long lists, any seed and penalty, and all numbers of rows."""
    engine = Engine(small, dataclasses.replace(SMALL, speculate=3, speculate_rows=1, most_biases=95, most_listed=60))
    steps = []
    engine.warm_up(lambda done, of: steps.append((done, of)))
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    nothing_is_left(engine, 0)
    assert engine.statistics.compiled == 0
    many = Sampling(0.7, seed=99, logit_bias=dict.fromkeys(range(90), -1.0), banned_tokens=range(60))
    jobs = [*mixed(), Job([1, 2, 3] * 8, 20, many), Job([5] * 30, 30, Sampling(no_repeat_ngram_size=20), logprobs=2)]
    asked = submit(engine, jobs)
    finish(engine)
    assert engine.statistics.compiled == 0
    for job in (jobs[0], Job([*range(60, 66)] * 2, 45)):  # the second repeats itself
        submit(engine, [job])
        finish(engine)
    assert engine.statistics.compiled == 0
    assert engine.statistics.guessed > 0
    assert all(found.reason in ("stop", "length") for _, _, found in asked)


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
def test_rows_that_cross_the_border_are_read_again_alone(small, speculate):
    """Several at once; one in the call in which another ends; a ring that is smaller than the text wraps meanwhile."""
    (short, other, third), (one,) = prompts(4, [10, 10, 13]), prompts(5, [9])
    repeated = [*range(60, 66)] * 2
    jobs = [Job(short, 30), Job(other, 40), Job(third, 4), Job(repeated, 45), Job(one, 7), Job(one, 8)]
    options = EngineOptions(slots=4, room=ROOM, chunk=8, speculate=speculate, speculate_rows=4)
    engine = Engine(small, options)
    assert engine.sizes.capacity < ROOM
    asked = submit(engine, jobs)
    finish(engine)
    for job, _, found in asked:
        (expected,) = generate(small, [job.prompt], job.max_new_tokens, options=Options(room=ROOM))
        assert (found.ids, found.reason) == (expected.token_ids, expected.finish_reason)
    nothing_is_left(engine, 6)
    assert (engine.statistics.guessed > 0) == (speculate > 0)


def test_jobs_that_make_no_sense_are_refused(tiny):
    engine = Engine(tiny, SMALL)
    for job, error in (
        (Job([], 1), "no tokens"),
        (Job([97], 1), r"ids \[97\] outside of the vocabulary"),
        (Job([1], -1), "max_new_tokens"),
        (Job([1] * ROOM, 1), "64 tokens"),
        (Job([1], 1, echo=True), "echo"),
        (Job([1], 1, logprobs=3), "at most 2"),
        (Job([1], 1, seconds=float("nan")), "seconds"),
        (Job([1], 1, adapter="x"), "adapter"),
        (Job([1], 1, stop=("x",)), "tokenizer"),
        (Job([1], 1, grammar=Grammar.choice(["x"])), "tokenizer"),
        (Job([1], 1, Sampling(banned_tokens=[5] * 65)), "banned_tokens has 65 entries"),
        (Job([1], 1, Sampling(logit_bias={97: 1.0})), r"logit_bias names tokens \[97\]"),
    ):
        with pytest.raises(ValueError, match=error):
            engine.submit(job, Listener())
    nothing_is_left(engine, 0)


def test_the_queue_is_bounded_whoever_submits(tiny):
    """Eight threads at once; and who is cancelled before the first turn makes room."""
    engine = Engine(tiny, dataclasses.replace(SMALL, queue=5))
    tickets, refused = [], []

    def ask() -> None:
        for _ in range(10):
            try:
                tickets.append(engine.submit(Job([1], 4), Listener()))
            except QueueFull:
                refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(tickets), len(refused)) == (7, 73)
    for ticket in tickets:
        engine.cancel(ticket)
    assert not engine.turn()
    nothing_is_left(engine, 7)
    engine.submit(Job([1], 4), Listener())
    engine.drain()
    with pytest.raises(QueueFull, match="about to stop"):
        engine.submit(Job([1], 4), Listener())


def test_who_stops_the_engine_leaves_nobody_waiting(tiny):
    engine, listener = Engine(tiny, SMALL), Listener()
    engine.submit(Job([1], 4), listener)
    engine.stop()
    engine.run()
    assert listener.reason == "interrupt"
    nothing_is_left(engine, 1)


def test_an_exception_ends_all_jobs_and_is_raised(tiny):
    engine, listeners = Engine(tiny, dataclasses.replace(SMALL, readers=1)), [Listener() for _ in range(3)]
    for listener in listeners:
        engine.submit(Job([1], 4), listener)
    engine.checkpoint = dataclasses.replace(tiny, params={})  # what it reads with is broken
    with pytest.raises(Exception, match="embed_tokens"):
        engine.run()
    for listener in listeners:
        assert listener.reason == "error"
        assert "embed_tokens" in str(listener.pieces[-1].error)
    nothing_is_left(engine, 3)
    with pytest.raises(QueueFull):
        engine.submit(Job([1], 4), Listener())


@pytest.mark.slow
def test_many_answers_to_a_long_prompt_do_not_stall_a_short_one(tiny):
    """They are one text that is read, however many wait for it."""
    engine = Engine(tiny, dataclasses.replace(SMALL, slots=4, readers=2))
    long, short = prompts(8, [63, 5])
    asked = submit(engine, [*[Job(long, 1)] * 3, Job(short, 2)])
    while not asked[3][2].ids:
        engine.turn()
    assert not any(found.ids for _, _, found in asked[:3])
    finish(engine)
    nothing_is_left(engine, 4)


def test_what_is_no_text_is_an_error_of_its_row_alone(tiny, small):
    """With a tokenizer of fewer ids than the model has."""
    tokenizer = small.tokenizer
    few = dataclasses.replace(tiny, tokenizer=dataclasses.replace(tokenizer, pieces=tokenizer.pieces[:90]))
    engine = Engine(few, SMALL)
    jobs = [Job([1, 2], 4, Sampling(forced_tokens=[1, 92, 1])), Job([1, 2], 4, Sampling(forced_tokens=[1] * 4))]
    (_, _, bad), (_, _, good) = submit(engine, jobs)
    finish(engine)
    assert (bad.reason, bad.ids) == ("error", [1])
    assert "outside of the vocabulary" in str(bad.pieces[-1].error)
    assert (good.reason, good.ids) == ("length", [1] * 4)
    nothing_is_left(engine, 2)


@pytest.mark.slow
def test_numbers_that_are_none_stay_with_their_row(tiny):
    """Where no kernel reads the cache: others get the memory afterwards, of a prompt and of an answer."""
    weight = tiny.params["embed_tokens"]["weight"]
    bad = dataclasses.replace(tiny, params=tiny.params | {"embed_tokens": {"weight": weight.at[13].set(np.nan)}})
    engine = Engine(bad, dataclasses.replace(SMALL, slots=1, cache_dtype="float16", prefix_bytes=0))
    forced = Job([5, 6], 3, Sampling(forced_tokens=[7, 13, 7]))
    reasons = [submit(engine, [job])[0][2] for job in (Job([13] * 9, 2), Job([5, 6], 2), forced, Job([5, 6], 2))]
    finish(engine)
    assert [listener.reason for listener in reasons] == ["error", "length", "error", "length"]
    assert reasons[1].ids == reasons[3].ids


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_crowd_changes_no_bit(tiny_folder, quantize):
    """On the CPU, for every number of rows, with rows that join and leave meanwhile."""
    model = phi3_jax.load(tiny_folder, quantize=quantize)
    engine = Engine(model, EngineOptions(slots=4, room=ROOM, chunk=8, top_logprobs=2))
    jobs = [Job(prompt, 14, logprobs=2) for prompt in prompts(6, [5, 20, 13, 9, 30, 2, 8])]
    before = []
    for job in jobs:
        before += submit(engine, [job])
        finish(engine)
    together = submit(engine, jobs)
    finish(engine)
    later = []
    for job in jobs:  # each joins some turns after the one before
        later += submit(engine, [job])
        for _ in range(4):
            engine.turn()
    finish(engine)
    for (_, _, one), (_, _, other), (_, _, third) in zip(before, together, later, strict=True):
        assert one.logprobs == other.logprobs == third.logprobs
        assert one.ids == other.ids == third.ids

"""When answers end: stop strings, also in byte tokens, and deadlines; no step is taken in vain."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
from spoiled import with_bytes

from phi3_jax.infer import Options, Run, Sampling, generate
from phi3_jax.infer import answer as answers
from phi3_jax.infer.answer import Answer, write_answers
from phi3_jax.infer.engine import NewTokens
from phi3_jax.infer.engine.run import Timings
from phi3_jax.infer.sampling import StopWatch, watched_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    return with_bytes(tiny, tmp_path_factory.mktemp("bytes"))


def in_bytes(text):
    return [byte + 3 for byte in text.encode()]


def test_a_stop_string_in_byte_tokens_ends_the_answer_at_once(small):
    """The answers are forced; the limit falls on the token that completes the stop string, or after it."""
    cat = small.tokenizer.encode("cat")
    answer = [*cat, *in_bytes("\n\U0001f600"), *cat]
    rows = [Sampling(forced_tokens=answer)] * 3
    limits = [len(cat) + 1, len(cat) + 5, len(answer)]
    for stop, text, ends in (
        ("\n", "cat", [1] * 3),
        ("\U0001f600", "cat\n", [1, 5, 5]),
        ("\n\U0001f600", "cat", [1, 5, 5]),
    ):
        streamed = []
        for on_piece in (None, streamed.append):
            results = generate(small, [[5]] * 3, limits, sampling=rows, stop=[stop], on_piece=on_piece)
            assert [len(result.token_ids) - len(cat) for result in results] == ends
            assert [result.finish_reason for result in results] == [
                "stop" if stop == "\n" else "length",
                "stop",
                "stop",
            ]
            assert [result.text for result in results][1:] == [text] * 2
        assert "".join(piece.text for piece in streamed if piece.row == 2) == text
    pieces = []
    generate(small, [[5]] * 3, limits, sampling=rows, on_piece=pieces.append)
    assert [piece.text for piece in pieces if piece.row == 2 and piece.text][-3:] == ["\n", "\U0001f600", " cat"]


def test_the_tokens_that_may_complete_a_stop_string(small):
    """Beside random texts: wherever one is complete, its last token and the one before it say so."""
    rng, found = random.Random(11), 0
    size = small.config.vocab_size
    ids = range(small.tokenizer.vocab_size)
    for stop in ("\n", "cat", "e d", "\U0001f600", "the cat sat on", "x\ufffd"):
        watched = watched_tokens([stop, "zzz"], small.tokenizer, size)
        assert watched.shape == (size,)
        assert (watched == 1).all() == ("\ufffd" in stop)
        common = small.tokenizer.encode(stop) + in_bytes(stop)
        for _ in range(300):
            stream, watch = small.tokenizer.stream(skip_special_tokens=True), StopWatch([stop, "zzz"])
            before = 0
            for token in rng.choices([*common * 20, *ids], k=12):
                watch.push(stream.push(token))
                if watch.stopped:
                    found += 1
                    assert watched[token] & 1 or (watched[token] & 2 and watched[before] & 4), (stop, before, token)
                    break
                before = token
    newline = watched_tokens(["\n"], small.tokenizer, size + 7)
    assert [i for i in ids if newline[i] & 1] == [i for i in ids if b"\n" in small.tokenizer.token_bytes(i)]
    assert not (newline & 2).any()
    assert found > 100
    assert not watched_tokens([], small.tokenizer, size).any()


def test_no_step_is_taken_after_a_stop_string(small, monkeypatch):
    """Calls of 32 steps end with the token after which the host has to look; without that, 26 steps were in vain."""
    cat = small.tokenizer.encode("cat")
    row = Sampling(forced_tokens=[*cat * 3, *in_bytes("\n"), *cat * 2])
    watched = watched_tokens(["\n"], small.tokenizer, small.config.vocab_size)
    wasted = []
    monkeypatch.setattr(answers, "_CALL_SECONDS", 1e6)
    for mask in (watched, None):
        run, answer = Run(small, [[5]] * 3, [30, 1, 1], [row] * 3, watched=mask), Answer(small, stop=["\n"])
        others = [Answer(small, 1), Answer(small, 2)]  # over after one token
        list(write_answers(run, [answer, *others], 32))
        assert (answer.finish().text, answer.finish_reason) == (small.tokenizer.decode(cat * 3), "stop")
        wasted.append(int(run._state.lengths[0]) - 1 - len(answer.finish().token_ids))
    assert wasted == [0, 30 - 3 * len(cat) - 1]


class FakeRun:
    """Takes a tenth of a second to read, and 12 ms for a step, by a clock of its own."""

    def __init__(self, deadline):
        self.options, self.timings, self.done, self.calls = Options(deadline=deadline), Timings(), [False], []
        self.clock = 100.0

    def advance(self, steps):
        seconds = 0.1 if not self.calls else 0.012 * steps
        self.timings.decode += 0 if not self.calls else seconds
        self.clock += seconds
        self.calls.append(steps)
        return [NewTokens([1] * (steps if len(self.calls) > 1 else 1), None)]

    def end(self, rows):
        self.done = [bool(rows)]

    @property
    def is_over(self):
        return all(self.done)


@pytest.mark.parametrize("deadline", [0.05, 0.5, 0.737])
def test_a_deadline_is_kept_within_a_step(tiny, monkeypatch, deadline):
    """With calls of 32 steps it was missed by up to 0.38 s here."""
    run = FakeRun(deadline)
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: run.clock))
    answer = Answer(dataclasses.replace(tiny, tokenizer=None))
    list(write_answers(run, [answer], 32))
    assert answer.finish_reason == "deadline"
    assert 0 <= run.clock - 100 - deadline <= (0.1 if deadline < 0.1 else 0.0121)
    assert max(run.calls) == (1 if deadline < 0.1 else 4)  # a twentieth of a second


def test_an_interrupt_is_seen_within_a_quarter_of_a_second(tiny, monkeypatch):
    run, asked = FakeRun(None), []
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: run.clock))
    answer = Answer(dataclasses.replace(tiny, tokenizer=None))

    def interrupt():
        asked.append(run.clock)
        return len(asked) == 9

    list(write_answers(run, [answer], 32, interrupt))
    assert answer.finish_reason == "interrupt"
    assert run.calls == [1, 1, *[20] * 7]  # how long a step takes is known after the first
    assert max(after - before for before, after in itertools.pairwise(asked)) <= 0.25

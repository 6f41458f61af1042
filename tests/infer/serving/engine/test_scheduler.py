"""The scheduler beside a plain model of it, in random orders; and mistakes planted in it, each of which is noticed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phi3_jax.infer.serving.engine import scheduler
from phi3_jax.infer.serving.engine.jobs import QueueFull


class Orders(RuleBasedStateMachine):
    """Attributes:
    kind: the class under test.
    waiting, reading, writing: where each job must be, in order.
    since: turns of other jobs since a job that is read had its own.
    """

    kind: Any = scheduler.Scheduler

    @initialize(slots=st.integers(1, 4), queue=st.integers(0, 3), readers=st.integers(1, 3), begun=st.integers(0, 3))
    def begin(self, slots: int, queue: int, readers: int, begun: int) -> None:
        """With some jobs that write already."""
        self.slots, self.queue, self.readers = slots, queue, readers
        self.one = self.kind(slots, queue, readers)
        self.waiting, self.reading, self.writing, self.added = [], [], [], 0
        self.since: dict[int, int] = {}
        for _ in range(min(begun, slots)):
            self.add_one()
            self.admit_one(0)
            self.move_on(self.reading[-1])

    @property
    def all(self) -> list[int]:
        return [*self.waiting, *self.reading, *self.writing]

    @rule(count=st.integers(1, 4))
    def add(self, count: int) -> None:
        for _ in range(count):
            self.add_one()

    def add_one(self) -> None:
        if len(self.all) >= self.slots + self.queue:
            with pytest.raises(QueueFull):
                self.one.add(self.added)
        else:
            self.one.add(self.added)
            self.waiting.append(self.added)
        self.added += 1

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        """Those that are read may have one text, or each one of its own."""
        self.admit_one(data.draw(st.integers(min(1, len(self.reading)), len(self.reading))))

    def admit_one(self, texts: int) -> None:
        has_room = texts < self.readers and len(self.reading) + len(self.writing) < self.slots
        expected = self.waiting[: int(has_room)]
        assert self.one.admit(texts) == (expected[0] if expected else None)
        self.waiting = self.waiting[len(expected) :]
        self.reading += expected
        self.since |= dict.fromkeys(expected, 0)

    @rule()
    def read(self) -> None:
        number = self.one.next_to_read()
        assert (number in self.reading) if self.reading else number is None
        if number is None:
            return
        self.reading.remove(number)
        self.reading.append(number)
        for other in self.reading[:-1]:
            self.since[other] += 1
            assert self.since[other] < self.slots  # as many turns as jobs are read at most
        self.since[number] = 0

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def has_read(self, data: st.DataObject) -> None:
        self.move_on(data.draw(st.sampled_from(self.reading)))

    def move_on(self, number: int) -> None:
        self.one.has_read(number)
        self.reading.remove(number)
        self.writing.append(number)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def must_read(self, data: st.DataObject) -> None:
        """It keeps its slot: it is read at once, whatever waits, and however many are read."""
        number = data.draw(st.sampled_from(self.writing))
        self.one.must_read(number)
        self.writing.remove(number)
        self.reading.append(number)
        self.since[number] = 0

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.all))
        self.one.end(number)
        for place in (self.waiting, self.reading, self.writing):
            if number in place:
                place.remove(number)

    @rule()
    def end_of_none(self) -> None:
        with pytest.raises(KeyError):
            self.one.end(-1)

    @invariant()
    def each_job_is_in_its_place(self) -> None:
        if not hasattr(self, "one"):
            return
        assert (self.one.waiting, self.one.reading, self.one.writing) == (self.waiting, self.reading, self.writing)
        assert len(self.one) == len(self.all) == len(set(self.all)) <= self.slots + self.queue
        assert len(self.reading) + len(self.writing) <= self.slots


QUICK = settings(max_examples=50, stateful_step_count=25, deadline=None, database=None, derandomize=True)


def test_every_job_is_in_one_place_and_has_its_turn():
    run_state_machine_as_test(Orders, settings=QUICK)


# What is replaced in scheduler.py, and by what.
MISTAKES = [
    ("self._waiting.append(number)", "self._waiting.appendleft(number)"),
    ("self._waiting.append(number)", "self._writing.append(number)"),
    ("self._waiting.append(number)", "pass"),
    (">= self.slots + self.queue", "> self.slots + self.queue"),
    (">= self.slots + self.queue", ">= self.queue"),
    (">= self.slots + self.queue", ">= self.slots"),
    ("if len(self) >=", "if len(self._waiting) >="),
    ("self._waiting.popleft()", "self._waiting.pop()"),
    ("self._waiting.popleft()", "self._waiting[0]"),
    ("texts >= self.readers", "texts > self.readers"),
    ("texts >= self.readers", "False"),
    ("texts >= self.readers", "len(self._reading) >= self.readers"),
    ("+ len(self._writing) >= self.slots", "+ len(self._writing) > self.slots"),
    ("len(self._reading) + len(self._writing) >= self.slots", "len(self._reading) >= self.slots"),
    ("len(self._reading) + len(self._writing) >= self.slots", "len(self._writing) >= self.slots"),
    ("popleft())\n        return self._reading[-1]", "popleft())\n        return self._reading[0]"),
    ("popleft())\n        return self._reading[-1]", "popleft())\n        return None"),
    ("self._reading.rotate(-1)", "self._reading.rotate(1)"),
    ("self._reading.rotate(-1)", "pass"),
    ("rotate(-1)\n        return self._reading[-1]", "rotate(-1)\n        return self._reading[0]"),
    ("        self._reading.remove(number)\n", ""),
    ("self._reading.remove(number)\n", "self._reading.popleft()\n"),
    ("self._reading.remove(number)\n        self._writing.append(number)", "self._reading.remove(number)"),
    ("        self._writing.remove(number)\n", ""),
    ("        self._reading.append(number)\n", "        self._waiting.append(number)\n"),
    ("        self._reading.append(number)\n", "        self._reading.appendleft(number)\n"),
    ("self._writing.remove(number)\n", "self._writing.pop()\n"),
    ("for place in (self._waiting, self._reading, self._writing)", "for place in (self._reading, self._writing)"),
    ("for place in (self._waiting, self._reading, self._writing)", "for place in (self._waiting, self._reading)"),
    ("raise KeyError(number)", "return"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_noticed(number: int):
    right, wrong = MISTAKES[number]
    source = Path(scheduler.__file__).read_text(encoding="utf-8")
    assert source.count(right) >= 1, right
    names = {"__name__": scheduler.__name__, "__package__": scheduler.__package__}
    exec(source.replace(right, wrong, 1), names)
    broken = type("Broken", (Orders,), {"kind": names["Scheduler"]})
    quick = settings(
        QUICK, max_examples=300, suppress_health_check=list(HealthCheck), phases=[Phase.generate], print_blob=False
    )
    with pytest.raises((AssertionError, LookupError, ValueError, QueueFull, pytest.fail.Exception)):
        run_state_machine_as_test(broken, settings=quick)

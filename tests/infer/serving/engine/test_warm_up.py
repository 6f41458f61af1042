"""The order of the warm-up's programs, and what ends it early; test_engine.py sees that none is missing."""

import threading

import pytest

from phi3_jax.infer.serving.engine.warm_up import run_all


def test_all_are_run_and_told_of_and_the_last_ones_in_order():
    ran, told = [], []
    together = [lambda number=number: ran.append(number) for number in range(9)]
    then = [lambda number=number: ran.append(number) for number in (9, 10)]
    run_all(together, then, lambda done, of: told.append((done, of, threading.current_thread())))
    assert sorted(ran[:9]) == list(range(9))
    assert ran[9:] == [9, 10]
    assert told == [(done, 11, threading.current_thread()) for done in range(1, 12)]


@pytest.mark.parametrize("who", ["program", "listener"])
def test_what_goes_wrong_is_raised_and_ends_it(who):
    ran = []

    def fails(*_: int) -> None:
        raise OSError(who)

    first, told = (fails, lambda done, of: None) if who == "program" else (lambda: None, fails)
    waits = threading.Event()
    slow = [lambda: waits.wait(0.2) and None] * 20
    with pytest.raises(OSError, match=who):
        run_all([first, *slow, lambda: ran.append(1)], [lambda: ran.append(2)], told)
    assert not ran  # those that had not begun are left out

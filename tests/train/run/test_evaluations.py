"""The evaluations of a run: which is the best, when patience ends, what the table says."""

import json
import math
import types
from typing import Any

import pytest

from phi3_jax.train.run import evaluations
from phi3_jax.train.run.evaluations import Evaluations
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.settings import Settings

NAN = float("nan")


def made(losses: list[float], held_out: str = "a", first: int = 0) -> Evaluations:
    found = Evaluations(held_out)
    for number, loss in enumerate(losses):
        found.add({"step": 10 * (first + number), "eval_loss": loss, "eval_accuracy": 0.25, "lr": 0.1})
    return found


@pytest.mark.parametrize(
    ("losses", "waited"),
    [
        ([3.0], 0),
        ([3.0, 2.0, 1.0], 0),
        ([3.0, 2.0, 2.0], 1),  # not lower
        ([3.0, 1.0, 2.0, 1.5, 1.25], 3),
        ([3.0, 1.0, 2.0, 0.5], 0),
        ([3.0, NAN, 2.0, NAN, float("inf")], 2),
        ([NAN, 3.0, NAN], 1),
        ([NAN, NAN], 1),  # the first has none before it
        ([NAN, NAN, NAN, 5.0, 6.0], 1),
        ([NAN], 0),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(losses, waited):
    found = made(losses)
    again = Evaluations("a", json.loads(json.dumps(found.records, allow_nan=False)))  # as a checkpoint keeps them
    for each in (found, again):
        assert [each.is_exhausted(patience) for patience in (1, 2, 3, 4)] == [
            patience <= waited for patience in range(1, 5)
        ]
        assert not each.is_exhausted(0)


def test_a_loss_that_is_no_number_is_not_the_best():
    best = made([3.0, NAN, 2.0, float("-inf"), 2.0]).best
    assert best is not None
    assert (best["step"], best["eval_loss"]) == (20, 2.0)
    assert made([NAN, float("inf")]).best is None
    assert made([]).best is None


def test_losses_on_other_data_do_not_compete():
    found = Evaluations("b", made([3.0, 0.5, 1.0, 1.0]).records)
    assert found.has_other_data
    assert found.best is None
    assert not found.is_exhausted(1)
    assert found.table() == []
    for record in made([2.0, 4.0, 4.0], first=4).records:
        found.add(record)
    assert not found.has_other_data
    best = found.best
    assert best is not None
    assert best["step"] == 40
    assert found.is_exhausted(2)
    assert not found.is_exhausted(3)
    assert [line.split()[:2] for line in found.table()[1:]] == [["best", "40"], ["last", "60"]]
    # The first data again.
    again = Evaluations("a", found.records)
    assert again.best is not None
    assert again.best["step"] == 10
    again.forget_after(5)
    assert again.best["step"] == 0


def test_means_are_over_all_batches(monkeypatch):
    batches: list[dict[str, float]] = []
    state: Any = types.SimpleNamespace(trainable=None)
    held_out: Any = range(9)  # of which only the length is asked
    checkpoint: Any = types.SimpleNamespace(config=None)
    monkeypatch.setattr(evaluations, "make_eval_step", lambda *_: lambda trainable, frozen, batch: batch)
    monkeypatch.setattr(evaluations, "eval_batches", lambda *_: batches)
    for method in ("sft", "dpo"):
        settings = Settings(method=method, pack=method == "sft")
        evaluate = evaluations.make_evaluation(settings, checkpoint, {}, held_out, Observer())
        batches[:] = [
            {"loss": 1.0, "weight": 3.0, "correct": 1.0, "tokens": 8.0} | ({"margin": 5.0} if method == "dpo" else {}),
            {"loss": 2.0, "weight": 5.0, "correct": 3.0, "tokens": 9.0} | ({"margin": 7.0} if method == "dpo" else {}),
        ]
        other = {"eval_margin": 1.5} if method == "dpo" else {"eval_perplexity": math.exp(0.375)}
        assert evaluate(state) == {"eval_loss": 0.375, "eval_accuracy": 0.5, **other}
        batches[:] = [{"loss": 0.0, "weight": 0.0, "correct": 0.0, "tokens": 0.0}]
        with pytest.raises(ValueError, match=r"^eval_file: no token of the held-out data is learned"):
            evaluate(state)


def test_the_table():
    assert made([4.39114, 0.27, 0.310004]).table() == [
        "held out     step        loss    accuracy",
        "before          0      4.3911        0.25",
        "best           10        0.27        0.25",
        "last           20        0.31        0.25",
    ]
    found = Evaluations("a")
    found.add({"step": 0, "eval_loss": 0.6931, "eval_accuracy": 0.0, "eval_margin": 0.0})
    found.add({"step": 7, "eval_loss": NAN, "eval_accuracy": 0.0, "eval_margin": NAN})
    assert found.table() == [
        "held out     step        loss    accuracy      margin",
        "before          0      0.6931           0           0",
        "last            7           -           0           -",
    ]
    found = Evaluations("a")
    found.add({"step": 3, "eval_loss": NAN})
    assert found.table() == ["held out     step        loss", "last            3           -"]

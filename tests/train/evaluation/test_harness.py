"""Under lm-evaluation-harness, which is not among the packages of the tests: pip install 'phi3_jax[harness]'."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import without_cache
from templates import PHI4_MINI, small_tokenizer
from training_runs import CONFIG

import phi3_jax
from phi3_jax.train.evaluation.evaluate import accuracy
from phi3_jax.train.evaluation.files import Question
from phi3_jax.train.evaluation.score import Score

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
QUESTIONS = [
    Question(f"{a}+{b} is", (str(a + b), f"about {a + b}", "no"), 0 if b % 2 else 2) for a in range(4) for b in range(5)
]


@pytest.fixture(scope="module")
def checkpoint() -> phi3_jax.Checkpoint:
    tokenizer = small_tokenizer(PHI4_MINI)
    return phi3_jax.Checkpoint(CONFIG, phi3_jax.random_params(CONFIG), tokenizer, phi3_jax.GenerationSettings((257,)))


@pytest.fixture(scope="module")
def model(checkpoint):
    from phi3_jax.train.evaluation.harness import HarnessModel

    return HarnessModel(checkpoint, phi3_jax.infer.generate)


def instances(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def total(checkpoint, ids, begin):
    rows = np.asarray(without_cache.logits(checkpoint, ids), np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return sum(logprobs[place - 1, ids[place]] for place in range(begin, len(ids)))


def test_likelihoods(checkpoint, model):
    encode = checkpoint.tokenizer.encode
    found = model.loglikelihood(instances("loglikelihood", ("ab", " cd"), ("", "x"), ("ab ", "c")))
    expected = [total(checkpoint, encode(text), begin) for text, begin in (("ab cd", 3), ("x", 1), ("ab c", 3))]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    text = "0123456789" * 13
    (rolling,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    ids = encode(text)
    # 63 predictions in the first window, as many in the second; the last four with all that fits before them.
    expected = total(checkpoint, ids[:64], 1) + total(checkpoint, ids[63:127], 1) + total(checkpoint, ids[67:], 60)
    assert rolling == pytest.approx(expected, abs=1e-3)


def test_the_path_is_passed_on(checkpoint, model, monkeypatch):
    from phi3_jax.train.evaluation import harness

    asked = []
    monkeypatch.setattr(harness, "score", lambda *_, path: asked.append(path) or [Score(np.zeros(1), True)])
    for path in ("generation", "exact", None):
        other = harness.HarnessModel(checkpoint, phi3_jax.infer.generate, path)
        assert other.loglikelihood(instances("loglikelihood", ("ab", " cd"))) == [(0.0, True)]
        assert other.loglikelihood_rolling(instances("loglikelihood_rolling", ("ab",))) == [0.0]
    assert asked == [path for path in ("generation", "exact", None) for _ in range(2)]


def test_answers(checkpoint, model):
    how = {"until": ["\n"], "max_gen_toks": 7}
    contexts = [f"{i} plus" for i in range(10)] + ["y" * 200]
    found = model.generate_until(instances("generate_until", *((context, how) for context in contexts)))
    for context, answer in zip(contexts, found, strict=True):
        ids = checkpoint.tokenizer.encode(context)[-57:]
        (alone,) = phi3_jax.infer.generate(checkpoint, [ids], max_new_tokens=7, stop=["\n"])
        assert answer == alone.text


def test_a_task_gives_our_own_accuracy(checkpoint, model, tmp_path):
    lines = [dataclasses.asdict(question) for question in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = ConfigurableTask(
        config={
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)["results"]["sums"]
    ours = accuracy(checkpoint, QUESTIONS)
    assert (results["acc,none"], results["acc_norm,none"]) == (ours.accuracy, ours.accuracy_normalised)
    assert 0 < ours.accuracy < 1
    assert ours.accuracy != ours.accuracy_normalised

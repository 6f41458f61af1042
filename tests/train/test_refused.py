"""Runs that are refused or fail; and one of all weights, from the files to the exported model."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from training_runs import write_data, write_run

import phi3_jax
from phi3_jax.kernels import QuantizedTensor, why_unavailable
from phi3_jax.train.data import batches, prepare
from phi3_jax.train.run import loop
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.memory import estimates
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.run.records.metrics import read
from phi3_jax.train.step import make_train_step, start

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_all_weights(tmp_path):
    settings = write_run(tmp_path, train="all", steps=3, lr=1e-3, optimizer="sgd", beta1=0.0, schedule="constant")
    settings = dataclasses.replace(settings, eval_file="", eval_every=50, warmup_steps=0)
    train(settings)
    exported = phi3_jax.load(tmp_path / "run" / "model")
    checkpoint = phi3_jax.load(settings.checkpoint)
    assert checkpoint.tokenizer is not None
    data = prepare(settings.train_file, checkpoint.tokenizer, settings, tmp_path / "data")
    state, frozen = start(settings, checkpoint.config, checkpoint.params)
    step = make_train_step(settings, checkpoint.config)
    for _, batch in zip(range(3), batches(data, settings), strict=False):
        state, _ = step(state, frozen, batch)
    for one, other in zip(jax.tree.leaves(exported.params), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_array_equal(one, other)
    assert exported.generation == checkpoint.generation
    with pytest.raises(ValueError, match="train_file: not given"):
        train(dataclasses.replace(settings, train_file=""))


def test_a_base_of_integers_keeps_its_own_dtype_and_must_not_be_packed(tmp_path):
    settings = write_run(tmp_path)
    for layout in ("rows", "packed") if why_unavailable() is None else ("rows",):
        model = phi3_jax.load(settings.checkpoint, "bfloat16", quantize="int8", layout=layout)
        phi3_jax.save(model, tmp_path / layout)
    loaded = loop._load(dataclasses.replace(settings, checkpoint=str(tmp_path / "rows")), Observer())
    assert isinstance(loaded.params["layers"]["mlp"]["down_proj"]["weight"], QuantizedTensor)
    assert loaded.params["norm"]["weight"].dtype == "bfloat16"
    if why_unavailable() is None:
        with pytest.raises(
            ValueError, match="packed: packed weights are in the order of the CPU kernels, which training"
        ):
            train(dataclasses.replace(settings, checkpoint=str(tmp_path / "packed")))


@pytest.mark.slow
def test_another_run_in_the_folder(tmp_path):
    settings = write_run(tmp_path, steps=1)
    train(settings)
    changes = {"lr": 0.5, "lora_targets": ("qkv_proj",), "keep_last": 5}
    with pytest.raises(
        ValueError, match=r"\(lora_targets=qkv_proj,.* there, qkv_proj here; lr=0.01 there, 0.5 here\): go on"
    ):
        train(dataclasses.replace(settings, **changes))
    write_data(tmp_path / "other.jsonl", 40, 3)
    with pytest.raises(ValueError, match=r"run: not what they were .* began are the rows of .*other\.jsonl: go on"):
        train(dataclasses.replace(settings, train_file=str(tmp_path / "other.jsonl")))
    # Without checkpoints the adapter would be taken for the new run's.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"adapter: from an earlier run, which .*checkpoints is empty; name another"):
        train(settings)


def test_two_processes_in_the_folder(tmp_path):
    settings = write_run(tmp_path)

    class Second(Observer):
        def begin(self, step: int, steps: int) -> None:
            with pytest.raises(OSError, match=r"run: process \d+ on .* is training there; name another output"):
                train(settings)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, Second())


@pytest.mark.slow
def test_steps_that_are_not_finite(tmp_path):
    changes = {"optimizer": "sgd", "lr": 1e30, "warmup_steps": 0}
    settings = write_run(tmp_path, **changes, max_bad_steps=3, save_every=1, log_every=4)
    with pytest.raises(ValueError, match=r"step 4: for 3 steps in a row \(max_bad_steps\) .* Checkpoints in .*: 1, 2"):
        train(dataclasses.replace(settings, keep_last=9))
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [record["finite"] for record in records[1:]] == [1, 0, 0, 0]
    assert records[4]["loss"] is None


@pytest.mark.slow
def test_too_little_memory(tmp_path, monkeypatch):
    settings = write_run(tmp_path, remat="full", loss_chunk=64)
    monkeypatch.setattr(estimates, "available", lambda: 10_000)
    with pytest.raises(ValueError, match=r"^the run needs .* of 0\.00: does not fit; .*batch_size=1 accumulation=4"):
        train(settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_preferences(tmp_path):
    """Also of all weights, whose frozen part is then the model at the start."""
    settings = write_run(tmp_path)
    for name, count in (("train.jsonl", 30), ("eval.jsonl", 9)):
        lines = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no"} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("lora", "all"):
        changes = {"method": "dpo", "pack": False, "train": kind, "lr": 1e-2 if kind == "lora" else 1e-3}
        changes |= {"lora_rank": 3 if kind == "lora" else 16, "lora_dropout": 0.0}
        ours = dataclasses.replace(settings, output=str(tmp_path / kind), **changes)
        outcome = train(ours)
        assert outcome.exported is not None
        records = read(tmp_path / kind / "metrics.jsonl")
        assert records[0]["eval_loss"] == pytest.approx(math.log(2))  # nothing is preferred yet
        assert records[-1]["eval_loss"] < 0.5
        assert records[-1]["eval_accuracy"] > 0.8
        assert "perplexity" not in records[-1]
        assert "margin" in records[-1]
        assert records[0]["eval_margin"] == 0
        assert records[-1]["eval_margin"] > 0

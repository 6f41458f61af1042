"""Runs: that a part and the rest are the whole, what is refused, and the numbers that are told."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import without_cache
from training_runs import Heard, shared_programs, tensors, untimed, write_run

import phi3_jax
from phi3_jax.train.evaluation.evaluate import held_out_loss
from phi3_jax.train.evaluation.files import read_data
from phi3_jax.train.run.checkpoints import Checkpoints
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.records.metrics import read
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import start


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """For all of the file: runs are compared bit for bit, and have to be compiled in one way."""
    with shared_programs():
        yield


def final_state(settings: Settings) -> list[np.ndarray]:
    """The newest checkpoint's leaves."""
    checkpoint = phi3_jax.load(settings.checkpoint)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        start(settings, checkpoint.config, checkpoint.params)[0],
    )
    with Checkpoints(Path(settings.output) / "checkpoints", 9, 9) as checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.restore(like).state)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Heard]:
    """A run that nothing interrupted."""
    settings, heard = write_run(tmp_path_factory.mktemp("whole")), Heard()
    outcome = train(settings, heard)
    assert outcome.step == 7
    assert outcome.exported == Path(settings.output) / "adapter"
    return settings, heard


def test_a_run_writes_what_it_tells(whole):
    settings, heard = whole
    folder = Path(settings.output)
    assert {entry.name for entry in folder.iterdir()} == {
        "adapter", "checkpoints", "data", "lock", "loss.png", "metrics.jsonl", "settings.json", "tensorboard",
    }  # fmt: skip
    # The last two, the best, and none more.
    records = read(folder / "metrics.jsonl")
    best = min((record["eval_loss"], record["step"]) for record in records if "eval_loss" in record)[1]
    assert {entry.name for entry in (folder / "checkpoints").iterdir()} == {"6", "7", str(best)}
    assert records == heard.records
    assert [record["step"] for record in records] == list(range(8))
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 3, 6, 7]
    for record in records[1:]:
        assert record["perplexity"] == math.exp(record["loss"])
        assert record["tokens_per_second"] > 0
    assert heard.begun == (0, 7)
    assert records[7]["eval_loss"] < records[0]["eval_loss"]
    data, held_out, chosen, fits = heard.notes
    assert chosen == "auto: dtype float32, compute_dtype float32, remat none, loss_chunk 1024"
    assert data == (
        f"train: {settings.train_file}: 40 lines, 40 texts, 464 tokens (119 learned), 20 rows of 29, 80% full; "
        "7 steps of 4 rows = 1.4 passes over the data; not used are the fields source"
    )
    assert held_out.startswith(f"held out: {settings.eval_file}: 7 lines, 7 texts, ")
    assert fits.startswith("needs ")
    assert fits.endswith(": fits")


def test_evaluation_is_what_single_tokens_give(whole):
    settings, heard = whole
    checkpoint = phi3_jax.load(settings.checkpoint, adapter=Path(settings.output) / "adapter")
    assert checkpoint.tokenizer is not None
    total, correct, count = 0.0, 0, 0
    for line in Path(settings.eval_file).read_text().splitlines():
        messages = json.loads(line)["messages"]
        before = phi3_jax.encode_chat(checkpoint.tokenizer, messages[:1])
        ids = [*before, *checkpoint.tokenizer.encode(messages[1]["content"], add_bos=False), 261]  # <|end|>
        logits = np.asarray(without_cache.logits(checkpoint, ids), np.float64)
        for place in range(len(before), len(ids)):
            row = logits[place - 1]
            total -= row[ids[place]] - math.log(np.exp(row).sum())
            correct += int(row.argmax() == ids[place])
            count += 1
    last = heard.records[-1]
    assert last["eval_loss"] == pytest.approx(total / count, abs=2e-5)
    assert held_out_loss(checkpoint, read_data(settings.eval_file, checkpoint.tokenizer, 64)).loss == pytest.approx(
        last["eval_loss"], abs=2e-5
    )
    assert last["eval_accuracy"] == pytest.approx(correct / count)
    assert last["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.slow
def test_a_run_in_parts_is_the_whole(whole, tmp_path):
    expected, heard = whole
    settings = write_run(tmp_path, log_every=5)
    settings = dataclasses.replace(settings, checkpoint=expected.checkpoint)  # a setting that matters, with its name
    done = 0
    for part in (3, 1):
        done += part
        ear = Heard(stop_after=part)
        outcome = train(settings, ear, ear.interrupt)
        assert (outcome.step, outcome.exported) == (done, None)
        assert ear.begun == (done - part, 7)
        if done > part:
            assert ear.notes[-1] == f"going on after step {done - part}, from the checkpoint of this run"
    assert train(settings).step == 7
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert untimed(records) == untimed(heard.records)
    for one, other in zip(final_state(settings), final_state(expected), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    ours, theirs = (tensors(Path(each.output) / "adapter") for each in (settings, expected))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    # Once more: nothing is left to do, and what was written stays.
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(settings).exported == tmp_path / "run" / "adapter"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_best_is_written_too_where_it_is_not_the_last(tmp_path):
    settings = write_run(tmp_path, lr=0.3, schedule="constant", warmup_steps=0, steps=2, eval_every=1)
    # Words are held out, and digits are learned.
    chat = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "three and some"}]
    Path(settings.eval_file).write_text(json.dumps({"messages": chat}) + "\n")
    heard = Heard()
    train(settings, heard)
    assert heard.records[1]["eval_loss"] < heard.records[2]["eval_loss"]
    best = tmp_path / "run" / "adapter-best"
    assert heard.notes[-1] == f"{best}: of step 1, whose held-out loss is the lowest of those kept"
    alone = dataclasses.replace(settings, output=str(tmp_path / "alone"), steps=1, save_every=1)
    train(alone)
    assert not (tmp_path / "alone" / "adapter-best").exists()
    ours, theirs = tensors(best), tensors(tmp_path / "alone" / "adapter")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)

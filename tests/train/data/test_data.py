"""Datasets: kept on disk, packed, and served in an order that the seed and the step decide."""

import dataclasses
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from templates import PHI4_MINI, small_tokenizer

import phi3_jax
from phi3_jax.model import Phi3
from phi3_jax.train.data import batches, eval_batches, prepare
from phi3_jax.train.data.dataset import DTYPES
from phi3_jax.train.data.order import rows_of_step
from phi3_jax.train.data.packing import FirstFit
from phi3_jax.train.settings import Settings

TOKENIZER = small_tokenizer(PHI4_MINI)
T = 17
SETTINGS = Settings(sequence_length=T, batch_size=4, accumulation=3, seed=5)
EOS = 257


def write_texts(path, lengths):
    """Texts of so many tokens, bos and eos among them."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh", k=n - 2)) for n in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [np.array([*TOKENIZER.encode(text), EOS]) for text in texts]


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(0)
    return write_texts(tmp_path / "data.jsonl", [rng.randrange(3, T + 1) for _ in range(50)])


@pytest.fixture
def dataset(texts, tmp_path):
    return prepare(tmp_path / "data.jsonl", TOKENIZER, SETTINGS, tmp_path / "kept")


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def first_fit(lengths, capacity):
    """As one would say it."""
    rows: list[int] = []
    for n in lengths:
        row = next((i for i, used in enumerate(rows) if used + n <= capacity), len(rows))
        rows[row : row + 1] = [rows[row] + n if row < len(rows) else n]
        yield row


@pytest.mark.parametrize(("capacity", "count"), [(1, 5), (13, 300), (64, 1000), (2048, 50)])
def test_first_fit(capacity, count):
    rng = random.Random(capacity)
    lengths = [min(capacity, 1 + int(rng.expovariate(3 / capacity))) for _ in range(count)]
    fit = FirstFit(capacity)
    expected = list(first_fit(lengths, capacity))
    assert [fit.place(n) for n in lengths] == expected
    assert fit.rows == max(expected) + 1


def test_rows_hold_every_text_once(texts, dataset):
    expected: dict[int, list[np.ndarray]] = {}
    for text, row in zip(texts, first_fit([len(t) for t in texts], T), strict=True):
        expected.setdefault(row, []).append(text)
    batch = dataset.rows(range(len(dataset)))
    assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int32, np.float32, np.int32, np.int32]
    for row, together in expected.items():
        n = sum(map(len, together))
        assert np.array_equal(batch.tokens[row, :n], np.concatenate(together))
        assert np.array_equal(batch.positions[row, :n], np.concatenate([np.arange(len(t)) for t in together]))
        assert np.array_equal(batch.segments[row, :n], np.repeat(range(len(together)), list(map(len, together))))
        assert np.array_equal(batch.weights[row, :n], batch.positions[row, :n] > 0)
        assert (batch.positions[row, n:] == -1).all()
        assert (batch.weights[row, n:] == 0).all()
        assert (batch.segments[row, n:] == 0).all()
    tokens = sum(map(len, texts))
    report = dataset.report
    assert (report.texts, report.rows, report.tokens) == (50, len(expected), tokens)
    assert report.learned_tokens == tokens - 50
    assert report.efficiency == tokens / (len(expected) * T)
    assert len(dataset) == len(expected)


def test_without_packing_each_text_has_a_row(texts, tmp_path):
    settings = dataclasses.replace(SETTINGS, pack=False)
    dataset = prepare(tmp_path / "data.jsonl", TOKENIZER, settings, tmp_path)
    batch = dataset.rows([7, 3])
    for row, text in enumerate([texts[7], texts[3]]):
        assert np.array_equal(batch.tokens[row, : len(text)], text)
        assert (batch.positions[row] == np.where(np.arange(T) < len(text), np.arange(T), -1)).all()
    assert (batch.segments == 0).all()
    assert dataset.report.efficiency == sum(map(len, texts)) / (50 * T)


def test_packed_logits_equal_those_of_each_text(tiny, tmp_path, quick_compilation):
    """Together longer than LongRoPE's border of 16, but each is shorter."""
    texts = write_texts(tmp_path / "data.jsonl", [9, 11])
    settings = dataclasses.replace(SETTINGS, sequence_length=23)
    batch = prepare(tmp_path / "data.jsonl", TOKENIZER, settings, tmp_path).rows([0])
    model = Phi3(dataclasses.replace(tiny.config, vocab_size=TOKENIZER.vocab_size))
    params = phi3_jax.random_params(model.config)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    packed = apply(batch.tokens, batch.positions, batch.segments)[0]
    for text, begin in zip(texts, (0, 9), strict=True):
        alone = apply(text[None])[0]
        assert abs(packed[begin : begin + len(text)] - alone).max() < 1e-5
        assert abs(alone).max() > 0.5
    assert list(np.flatnonzero(batch.weights[0] == 0)) == [0, 9, 20, 21, 22]  # nothing is learned across the seam


def test_preferences_are_pairs(tmp_path):
    lines = [{"prompt": "q" * i, "chosen": "y" * (i + 1), "rejected": "no"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dataclasses.replace(SETTINGS, method="dpo", pack=False)
    dataset = prepare(tmp_path / "data.jsonl", TOKENIZER, settings, tmp_path)
    assert (len(dataset), dataset.report.texts) == (5, 10)
    pair = dataset.rows([4, 2, -1])
    for row, i in enumerate([4, 2]):
        for side, reply in ((pair.chosen, "y" * (i + 1)), (pair.rejected, "no")):
            ids = [*TOKENIZER.encode("q" * i + reply), EOS]
            assert list(side.tokens[row]) == ids + [0] * (T - len(ids))
            learned = [j > i for j in range(len(ids))]
            assert list(side.weights[row]) == learned + [False] * (T - len(ids))
    assert (pair.chosen.positions[2] == -1).all()
    step = next(batches(dataset, settings, 0))
    assert step.rejected.tokens.shape == (3, 4, T)
    assert [batch.chosen.tokens.shape for batch in eval_batches(dataset, settings)] == [(4, T)] * 2


# ---------------------------------------------------------------- the order


def test_every_epoch_has_every_row_once_in_a_new_order():
    stream = np.concatenate([rows_of_step([31], SETTINGS, step).reshape(-1) for step in range(31)])
    epochs = stream[: 31 * 12].reshape(12, 31)
    assert (np.sort(epochs) == np.arange(31)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 12
    other = rows_of_step([31], dataclasses.replace(SETTINGS, seed=6), 0)
    assert not np.array_equal(other, rows_of_step([31], SETTINGS, 0))


def test_the_order_stays_the_same_for_ever():
    assert rows_of_step([31], SETTINGS, 2).tolist() == [[28, 16, 18, 8], [14, 30, 25, 10], [7, 30, 27, 25]]


def test_going_on_gives_the_same_batches(dataset):
    whole = list(itertools.islice(batches(dataset, SETTINGS, 0), 20))
    assert whole[0].tokens.shape == (3, 4, T)
    for step in (1, 7, 13, 19):
        assert equal(next(batches(dataset, SETTINGS, step)), whole[step])
    rows = rows_of_step([len(dataset)], SETTINGS, 7)
    assert equal(jax.tree.map(lambda leaf: leaf[2], whole[7]), dataset.rows(rows[2]))


def test_shards_of_processes_are_the_whole(dataset, monkeypatch):
    whole = [next(batches(dataset, SETTINGS, 3)), *eval_batches(dataset, SETTINGS)]
    shards = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shards.append([next(batches(dataset, SETTINGS, 3)), *eval_batches(dataset, SETTINGS)])
    for one, *parts in zip(whole, *shards, strict=True):
        assert equal(one, jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-2), *parts))
    with pytest.raises(ValueError, match="batch_size=3 does not divide among 2 processes"):
        next(batches(dataset, dataclasses.replace(SETTINGS, batch_size=3), 0))


def test_evaluation_has_every_row_once_and_fills_up(dataset):
    settings = dataclasses.replace(SETTINGS, batch_size=len(dataset) - 2)
    first, second = eval_batches(dataset, settings)
    assert equal(first, dataset.rows(range(len(dataset) - 2)))
    assert np.array_equal(second.tokens[:2], dataset.rows([len(dataset) - 2, len(dataset) - 1]).tokens)
    assert second.tokens.shape == first.tokens.shape
    assert (second.weights[2:] == 0).all()
    assert (second.positions[2:] == -1).all()


# ---------------------------------------------------------------- bad lines


def test_a_bad_line_stops_or_is_left_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "ab", "id": 3}\n\n{"text": 3}\n{"text": "cd"}\n[]\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: text is not a string but int \(on_bad_line=skip"):
        prepare(path, TOKENIZER, SETTINGS, tmp_path / "kept")
    assert [p.suffix for p in (tmp_path / "kept").iterdir()] == [".lock"]
    settings = dataclasses.replace(SETTINGS, on_bad_line="skip")
    report = prepare(path, TOKENIZER, settings, tmp_path / "kept").report
    assert (report.texts, report.bad_lines, report.ignored_fields) == (2, 2, ("id",))
    assert [line for line, _ in report.reasons] == [3, 5]
    assert prepare(path, TOKENIZER, settings, tmp_path / "kept").report == report

    path.write_text("\n[]\n")
    with pytest.raises(ValueError, match=r"no line of it can be used; line 2: it is JSON but not an object"):
        prepare(path, TOKENIZER, settings, tmp_path / "kept")
    path.write_text("")
    with pytest.raises(ValueError, match="no line of it can be used: it is empty"):
        prepare(path, TOKENIZER, settings, tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        prepare(tmp_path / "none.jsonl", TOKENIZER, settings, tmp_path / "kept")


# ---------------------------------------------------------------- what is kept


@pytest.fixture
def lines_read(monkeypatch):
    """How many lines have been tokenised."""
    count = [0]

    def counted(*arguments):
        count[0] += 1
        return real(*arguments)

    preparation = importlib.import_module("phi3_jax.train.data.prepare")  # the room exports a function of this name
    real = preparation.encode_forms
    monkeypatch.setattr(preparation, "encode_forms", counted)
    return count


def test_nothing_is_tokenised_twice(texts, tmp_path, lines_read):
    path, kept = tmp_path / "data.jsonl", tmp_path / "kept"
    first = prepare(path, TOKENIZER, SETTINGS, kept)
    assert lines_read == [50]
    # What says nothing about the rows may change.
    same = dataclasses.replace(SETTINGS, seed=9, batch_size=2, lr=1.0)
    again = prepare(path, TOKENIZER, same, kept)
    assert lines_read == [50]
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report
    assert equal(first.rows(range(len(first))), again.rows(range(len(first))))

    fingerprints = {first.fingerprint}
    for changes in ({"sequence_length": 19}, {"pack": False}):
        fingerprints.add(prepare(path, TOKENIZER, dataclasses.replace(SETTINGS, **changes), kept).fingerprint)
    for changes in ({"add_bos": False}, {"eos_id": 3}):
        fingerprints.add(prepare(path, dataclasses.replace(TOKENIZER, **changes), SETTINGS, kept).fingerprint)
    assert len(fingerprints) == 5
    # What may come to other rows is read again, and here comes to the same.
    for changes in ({"loss_on": "all"}, {"on_bad_line": "skip"}):
        other = dataclasses.replace(SETTINGS, **changes)
        assert prepare(path, TOKENIZER, other, kept).fingerprint == first.fingerprint
    os.utime(path, ns=(1, 1))
    for changes in ({}, {"chat_template": "{{ 1 }}"}):
        other = dataclasses.replace(TOKENIZER, **changes)
        assert prepare(path, other, SETTINGS, kept).fingerprint == first.fingerprint
    assert lines_read == [50 * 9]


def cut_off(content: bytes) -> bytes:
    return content[:-3]


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut_off, flipped, None])
@pytest.mark.parametrize("name", ["header.json", *(f"{name}.bin" for name in DTYPES)])
def test_damaged_files_are_made_again(texts, dataset, tmp_path, name, damage):
    expected, lines = dataset.rows(range(len(dataset))), dataset.lines.copy()
    (path,) = (tmp_path / "kept").glob(f"*/{name}")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"kept/\w+: prepared data that cannot be used \({name} .*\): made again$"):
        again = prepare(tmp_path / "data.jsonl", TOKENIZER, SETTINGS, tmp_path / "kept")
    assert equal(again.rows(range(len(again))), expected)
    assert (again.report, again.fingerprint) == (dataset.report, dataset.fingerprint)
    assert equal(again.lines, lines)
    prepare(tmp_path / "data.jsonl", TOKENIZER, SETTINGS, tmp_path / "kept")  # without a warning


def test_only_one_of_two_makes_it(texts, tmp_path, lines_read):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(prepare(tmp_path / "data.jsonl", TOKENIZER, SETTINGS, tmp_path / "kept"))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines_read == [50]
    assert equal(*(dataset.rows([0, 1]) for dataset in found))


KILLED = """
import os, signal, sys
from test_data import SETTINGS, TOKENIZER, prepare
def on_progress(done, total):
    if done > total * float(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
prepare(sys.argv[1], TOKENIZER, SETTINGS, sys.argv[2], on_progress)
"""


def test_a_killed_preparation_leaves_nothing_that_is_used(texts, dataset, tmp_path):
    path, kept = tmp_path / "data.jsonl", tmp_path / "other"
    command = [sys.executable, "-c", KILLED, path, kept, "0.6"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2] / 'helpers'}:{Path(__file__).parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.suffix for p in kept.iterdir()) == [".lock", ".partial"]
    again = prepare(path, TOKENIZER, SETTINGS, kept)
    assert equal(again.rows(range(len(again))), dataset.rows(range(len(dataset))))
    assert sorted(p.suffix for p in kept.iterdir()) == ["", ".lock"]


def test_progress_counts_the_bytes_of_the_file(texts, tmp_path):
    seen: list[tuple[int, int]] = []
    path = tmp_path / "data.jsonl"
    prepare(path, TOKENIZER, SETTINGS, tmp_path / "kept", lambda done, total: seen.append((done, total)))
    lengths = [len(line) for line in path.read_bytes().splitlines(keepends=True)]
    assert seen == [(done, path.stat().st_size) for done in itertools.accumulate(lengths)]

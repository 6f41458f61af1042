"""Several files, how often an epoch has each, and what is held out of them: against counts and obvious loops."""

import collections
import dataclasses
import itertools
import json
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from templates import PHI4_MINI, small_tokenizer

from phi3_jax.train.data import (
    Mixture,
    batches,
    epoch_size,
    eval_batches,
    prepare,
    require_different_files,
    require_held_out,
)
from phi3_jax.train.data.order import rows_of_evaluation, rows_of_step
from phi3_jax.train.settings import Settings, change

TOKENIZER = small_tokenizer(PHI4_MINI)
SETTINGS = Settings(sequence_length=19, batch_size=3, accumulation=2, seed=5)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def some_texts(letter, count):
    return [letter * (2 + i % 5) + str(i) for i in range(count)]


def mixed(paths, folder, settings=SETTINGS, part="all"):
    return Mixture(
        tuple(map(str, paths)), tuple(prepare(path, TOKENIZER, settings, folder, part=part) for path in paths)
    )


# ---------------------------------------------------------------- the order


def stream(counts, settings, steps):
    return np.concatenate([rows_of_step(counts, settings, step).reshape(-1) for step in range(steps)])


@pytest.mark.parametrize(
    ("counts", "mixture"),
    [
        ([7, 12], (2.0, 0.5)),
        ([5, 9, 4], (1.0, 0.25, 3.0)),
        ([11], (0.3,)),
        ([10, 3], (0.29, 1.5)),
        ([2, 1], (0.1, 0.4)),
    ],
)
def test_an_epoch_has_each_file_as_often_as_the_mixture_says(counts, mixture):
    settings = dataclasses.replace(SETTINGS, train_file=("x",) * len(counts), mixture=mixture)
    exact = [count * Fraction(str(times)) for count, times in zip(counts, mixture, strict=True)]
    assert epoch_size(counts, settings) == sum(exact)
    rows = stream(counts, settings, 130)
    starts = np.cumsum([0, *counts])
    at = 0
    passes = [collections.Counter() for _ in counts]
    for epoch in range(300):
        size = [math.floor(each * (epoch + 1)) - math.floor(each * epoch) for each in exact]
        some = rows[at : at + sum(size)]
        if len(some) < sum(size):
            break
        at += sum(size)
        for file, count in enumerate(counts):
            own = some[(some >= starts[file]) & (some < starts[file + 1])]
            assert len(own) == size[file]
            passes[file].update(own.tolist())
            seen = [passes[file][row] for row in range(starts[file], starts[file + 1])]
            # All rows come round: an epoch may have two halves of different passes, hence 2.
            assert max(seen) - min(seen) <= 1 or size[file] % count
            assert max(seen) - min(seen) <= 2
            if math.floor(exact[file] * (epoch + 1)) % count == 0:
                assert max(seen) == min(seen)
    assert epoch >= 2


def test_halves_are_others_in_each_pass_and_epochs_are_shuffled():
    settings = dataclasses.replace(SETTINGS, train_file=("a", "b"), mixture=(1.0, 0.5), batch_size=14, accumulation=1)
    epochs = [rows_of_step([4, 20], settings, step)[0] for step in range(40)]
    halves = [frozenset(each[each >= 4].tolist()) for each in epochs]
    assert all(len(half) == 10 for half in halves)
    assert all(one | other == set(range(4, 24)) for one, other in zip(halves[::2], halves[1::2], strict=True))
    assert len(set(halves)) > 30
    # The rows of both files are mixed, not one after the other.
    places = [np.flatnonzero(each < 4) for each in epochs]
    assert len({tuple(each) for each in places}) > 30
    assert 4 < np.mean(places) < 9
    other = dataclasses.replace(settings, seed=6)
    assert not np.array_equal(rows_of_step([4, 20], other, 0), rows_of_step([4, 20], settings, 0))


def test_without_a_mixture_several_files_are_in_the_order_of_one():
    assert np.array_equal(stream([7, 12, 0, 4], SETTINGS, 30), stream([23], SETTINGS, 30))


def test_the_rows_of_several_files_are_those_of_each(tmp_path):
    paths = [write(tmp_path / f"{letter}.jsonl", some_texts(letter, n)) for letter, n in (("a", 9), ("b", 4), ("c", 7))]
    data = mixed(paths, tmp_path / "kept")
    alone = [each.rows(range(len(each))) for each in data.parts]
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *alone)
    order = [len(data) - 1, 0, data.counts[0], -1, 1]
    found = data.rows(order)
    for name in ("tokens", "weights", "positions", "segments"):
        leaf = getattr(together, name)
        assert np.array_equal(getattr(found, name)[[0, 1, 2, 4]], leaf[[each for each in order if each != -1]])
    assert (found.positions[3] == -1).all()
    # No row has texts of two files.
    letters = [{chr(t) for t in bytes(TOKENIZER.decode(row, skip_special_tokens=True), "utf8")} & set("abc")
               for row in together.tokens.tolist()]  # fmt: skip
    assert all(len(each) == 1 for each in letters)
    assert [sum(letter in each for each in letters) for letter in "abc"] == list(data.counts)
    assert data.fingerprint != mixed(paths[::-1], tmp_path / "kept").fingerprint
    assert mixed(paths[:1], tmp_path / "kept").fingerprint == data.parts[0].fingerprint
    step = next(batches(data, dataclasses.replace(SETTINGS, train_file=("a", "b", "c"), mixture=(2, 1, 0.5)), 3))
    assert step.tokens.shape == (2, 3, 19)


# ---------------------------------------------------------------- epochs and steps


def test_steps_and_epochs():
    assert Settings().all_steps() == Settings().all_steps(Fraction(7)) == 100
    assert Settings(steps=7).all_steps() == 7
    for epochs, rows, steps in ((1.5, 20, 5), (1, 20, 4), (0.1, 20, 1), (0.29, 600, 29), (3, 8, 4), (0.001, 1, 1)):
        assert dataclasses.replace(SETTINGS, epochs=epochs).all_steps(Fraction(rows)) == steps
    with pytest.raises(ValueError, match=r"epochs=1\.5: how many steps these are depends on the data"):
        Settings(epochs=1.5).all_steps()
    with pytest.raises(ValueError, match=r"epochs=2\.0 and steps=5: give one of them, and 0 for the other"):
        change(Settings(steps=5), ["epochs=2"])
    assert change(Settings(steps=5), ["epochs=2", "steps=0"]).epochs == 2


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c"):
        write(tmp_path / name, ["x"])
    for text, names in (
        ("x", ("x",)), ("x,y", ("x", "y")), ("a,b.jsonl", ("a,b.jsonl",)), ("c,a,b.jsonl,o/n:train",
        ("c", "a,b.jsonl", "o/n:train")), ("", ()),
    ):  # fmt: skip
        assert change(Settings(), [f"train_file={text}"]).train_files == names
        assert change(Settings(), [f"eval_file={text}"]).eval_files == names
    assert Settings(train_file="a,b").train_files == ("a,b",)
    assert change(Settings(train_file=("a", "b")), ["mixture=2,0.5"]).mixture == (2.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train_file=a,"], "train_file and eval_file: one of the names is empty"),
        (["train_file=a,b", "mixture=2"], r"mixture=2\.0: numbers are 1, and names in train_file 2; give one for each"),
        (["train_file=a", "mixture=0"], r"mixture=0\.0: must be at least 0\.001 and at most 1000"),
        (["train_file=a", "mixture=nan"], "mixture=nan: must be at least"),
        (["train_file=a", "mixture=-1"], "mixture=-1"),
        (["eval_file=a", "eval_fraction=0.1"], "eval_fraction and eval_file: give one of them"),
        (["eval_fraction=1"], r"eval_fraction=1\.0: must be at least 0 and below 1"),
        (["eval_fraction=-0.1"], r"eval_fraction=-0\.1: must be at least 0"),
        (["eval_rows=3"], "eval_rows: nothing is held out"),
        (["epochs=nan"], "epochs=nan"),
        (["steps=-1"], "steps=-1: must be at least 0"),
        (["mixture=a"], "mixture=a: must be a number"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        change(Settings(), changes)


# ---------------------------------------------------------------- what is held out


def told(dataset):
    """The texts in a data set."""
    tokens = dataset._arrays["tokens"]
    starts = dataset._arrays["text_starts"]
    texts = [tokens[begin:end].tolist() for begin, end in itertools.pairwise(starts)]
    return [TOKENIZER.decode(each, skip_special_tokens=True) for each in texts]


def test_a_fraction_is_held_out_by_its_contents(tmp_path):
    texts = some_texts("a", 300)
    settings = dataclasses.replace(SETTINGS, eval_fraction=0.2)
    sides = {}
    for name, content in (("one", texts), ("more", [*some_texts("b", 40), *texts[::-1], *texts[:50]])):
        path = write(tmp_path / f"{name}.jsonl", content)
        parts = [prepare(path, TOKENIZER, settings, tmp_path / "kept", part=part) for part in ("train", "held_out")]
        sides[name] = [set(told(part)) for part in parts]
        assert not sides[name][0] & sides[name][1]
        assert sorted(told(parts[0]) + told(parts[1])) == sorted(content)
        assert not np.isin(parts[0].lines, parts[1].lines).any()
        assert parts[0].report.lines + parts[1].report.lines == len(content)
    # Lines that are added, or come twice with other ids, change nothing for the others.
    assert all(few <= many for few, many in zip(sides["one"], sides["more"], strict=True))
    assert 35 <= len(sides["one"][1]) <= 85  # of 300, 4 standard deviations
    held_out = {}
    for fraction, seed in ((0.2, 6), (0.4, 5)):
        other = dataclasses.replace(settings, eval_fraction=fraction, seed=seed)
        held_out[fraction] = set(
            told(prepare(tmp_path / "one.jsonl", TOKENIZER, other, tmp_path / "kept", part="held_out"))
        )
    assert held_out[0.2] != sides["one"][1]
    assert held_out[0.4] > sides["one"][1]


@pytest.mark.parametrize("pack", [True, False])
def test_what_is_held_out_is_never_trained_on(tmp_path, pack):
    """Of two files that share lines, in all that several epochs have; the lines are longer than a row."""
    common = [f"{i:03}" + "z" * 40 for i in range(20)]
    one = write(tmp_path / "one.jsonl", [f"{i:03}" + "a" * 30 for i in range(100, 140)] + common)
    two = write(tmp_path / "two.jsonl", [f"{i:03}" + "b" * 9 for i in range(200, 240)] + common)
    settings = dataclasses.replace(
        SETTINGS, eval_fraction=0.3, train_file=(str(one), str(two)), mixture=(1.5, 0.5), pack=pack
    )
    sides = [mixed([one, two], tmp_path / "kept", settings, part) for part in ("train", "held_out")]
    require_held_out(*sides, settings)
    steps = math.ceil(4 * epoch_size(sides[0].counts, settings) / 6)
    stream = batches(sides[0], settings)
    trained = {text for _ in range(steps) for row in next(stream).tokens.reshape(-1, 19).tolist()
               for text in TOKENIZER.decode(row).split("<|endoftext|>")}  # fmt: skip
    held_out = [row for batch in eval_batches(sides[1], settings) for row in batch.tokens.tolist()]
    known = "".join(trained)
    numbers = {text[:3] for part in sides[1].parts for text in told(part) if text[:3].isdecimal()}
    assert len(numbers) > 20
    assert {*numbers} & {f"{i:03}" for i in range(20)}
    assert not any(number in known for number in numbers)
    assert {text[:3] for part in sides[0].parts for text in told(part) if text[:3].isdecimal()} == {
        f"{i:03}" for i in (*range(20), *range(100, 140), *range(200, 240))
    } - numbers
    assert len(held_out) >= len(sides[1])


def test_nothing_on_one_side(tmp_path):
    path = write(tmp_path / "one.jsonl", some_texts("a", 5))
    few = dataclasses.replace(SETTINGS, eval_fraction=1e-9)
    sides = [mixed([path], tmp_path / "kept", few, part) for part in ("train", "held_out")]
    with pytest.raises(
        ValueError, match=r"eval_fraction=1e-09: holds out none of the 5 lines of .*one\.jsonl; raise it"
    ):
        require_held_out(*sides, few)
    many = dataclasses.replace(SETTINGS, eval_fraction=1 - 1e-6)
    with pytest.raises(ValueError, match=r"one\.jsonl: no line of it can be used: eval_fraction=0\.9.* holds out all"):
        prepare(path, TOKENIZER, many, tmp_path / "kept", part="train")


def test_bad_lines_are_told_once(tmp_path):
    path = write(tmp_path / "one.jsonl", some_texts("a", 30))
    path.write_text(path.read_text() + "[]\n" * 10)
    settings = dataclasses.replace(SETTINGS, eval_fraction=0.3, on_bad_line="skip")
    parts = [prepare(path, TOKENIZER, settings, tmp_path / "kept", part=part) for part in ("train", "held_out")]
    assert [part.report.bad_lines for part in parts] == [10, 0]
    assert sum(part.report.lines for part in parts) == 30


def test_rows_of_evaluation_are_chosen_by_the_seed(tmp_path):
    assert rows_of_evaluation(7, SETTINGS).tolist() == list(range(7))
    settings = dataclasses.replace(SETTINGS, eval_file="x", eval_rows=10)
    assert rows_of_evaluation(7, settings).tolist() == list(range(7))
    chosen = [rows_of_evaluation(200, dataclasses.replace(settings, seed=seed)).tolist() for seed in range(30)]
    assert all(len(set(each)) == 10 and each == sorted(each) and each[-1] < 200 for each in chosen)
    assert len(set(map(tuple, chosen))) == 30
    assert 80 < np.mean(chosen) < 120
    paths = [write(tmp_path / f"{letter}.jsonl", some_texts(letter, 40)) for letter in "ab"]
    data = mixed(paths, tmp_path / "kept")
    rows = rows_of_evaluation(len(data), settings)
    assert rows[0] < data.counts[0] <= rows[-1]
    tokens = np.concatenate([batch.tokens for batch in eval_batches(data, settings)])
    assert tokens.shape == (12, 19)
    assert np.array_equal(tokens[:10], data.rows(rows).tokens)
    assert (tokens[10:] == 0).all()


# ---------------------------------------------------------------- the same files


def test_the_same_file_is_not_trained_on_and_held_out(tmp_path):
    one, other = (write(tmp_path / f"{name}.jsonl", some_texts(name, 5)) for name in "ab")
    (tmp_path / "copy.jsonl").write_bytes(one.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(one)
    settings = dataclasses.replace(SETTINGS, train_file=(str(other), str(one)), eval_file=str(one))
    for name in ("a", "copy", "link"):
        held_out = str(tmp_path / f"{name}.jsonl")
        message = rf"train_file .*a\.jsonl and eval_file {held_out} are the same: .* hold lines out with eval_fraction"
        with pytest.raises(ValueError, match=message):
            require_different_files(dataclasses.replace(settings, eval_file=held_out))
        message = (
            rf"train_file {one} and train_file {held_out} are the same: name it once; mixture=2|names a file twice"
        )
        with pytest.raises(ValueError, match=message):
            require_different_files(dataclasses.replace(settings, train_file=(str(one), held_out), eval_file=()))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        require_different_files(dataclasses.replace(settings, eval_file="none.jsonl"))
    require_different_files(dataclasses.replace(settings, eval_file=()))
    # The same lines in another notation are known by the rows.
    (tmp_path / "a.json").write_text(json.dumps([json.loads(line) for line in one.read_text().splitlines()]))
    again = dataclasses.replace(settings, eval_file=str(tmp_path / "a.json"))
    require_different_files(again)
    with pytest.raises(ValueError, match=r"train_file .*a\.jsonl and eval_file .*a\.json are the same"):
        require_held_out(mixed([other, one], tmp_path), mixed([tmp_path / "a.json"], tmp_path), again)

"""What a run says of its data and its length before it begins, and that epochs are compared as epochs."""

import dataclasses
import json
import types

import pytest
from templates import PHI4_MINI, small_tokenizer

from phi3_jax.train.run.observer import Observer
from phi3_jax.train.run.run_data import prepare_data
from phi3_jax.train.run.run_folder import check_settings
from phi3_jax.train.settings import Settings

CHECKPOINT = types.SimpleNamespace(tokenizer=small_tokenizer(PHI4_MINI), config=types.SimpleNamespace(vocab_size=300))


class Heard(Observer):
    def __init__(self):
        self.notes: list[str] = []

    def note(self, text):
        self.notes.append(text)


def write(path, count, letter="x", length=6):
    """Texts of `length` tokens, bos and eos among them."""
    lines = [{"text": (letter + f"{i:03}" * length)[: length - 2], "id": i} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def notes(settings, tmp_path):
    heard = Heard()
    data, held_out = prepare_data(CHECKPOINT, dataclasses.replace(settings, output=str(tmp_path / "run")), heard)
    return heard.notes, data, held_out


def test_one_line_has_what_a_newcomer_needs(tmp_path):
    name = write(tmp_path / "a.jsonl", 30)
    (note, *warnings), data, held_out = notes(Settings(train_file=name, sequence_length=31), tmp_path)
    assert held_out is None
    assert len(data) == 6
    assert note == (
        f"train: {name}: 30 lines, 30 texts, 180 tokens (150 learned), 6 rows of 31, 97% full; 100 steps of 4 rows = "
        "66.7 passes over the data; not used are the fields id"
    )
    by_heart = " in so many passes over the data a model learns the lines by heart"
    assert [warning.split(":")[1] for warning in warnings] == [by_heart]
    (note, *warnings), *_ = notes(Settings(train_file=name, sequence_length=31, batch_size=8), tmp_path)
    assert "100 steps of 8 rows = 133 passes" in note
    twice = " a step takes 8 rows, and a pass over the data has 6, so that it has some of them twice"
    assert [warning.split(":")[1] for warning in warnings] == [twice, by_heart]
    settings = Settings(train_file=name, sequence_length=6, batch_size=2, epochs=1.5, accumulation=3, warmup_steps=7)
    (note,), *_ = notes(settings, tmp_path)
    assert note.endswith(
        " 30 rows of 6, 100% full; 8 steps of 6 rows = 1.6 passes over the data; not used are the fields id"
    )
    (_, warning), *_ = notes(dataclasses.replace(settings, warmup_steps=8), tmp_path)
    assert warning == (
        "WARNING: the learning rate never comes up to lr=0.0001, because it rises for warmup_steps=8 steps, and the "
        "run has 8 steps: lower one, or raise the other"
    )
    settings = Settings(train_file=name, sequence_length=6, batch_size=1, steps=600)
    (note,), *_ = notes(settings, tmp_path)
    assert "; 600 steps of 1 row = 20 passes over the data; " in note
    (note, warning), *_ = notes(dataclasses.replace(settings, steps=601), tmp_path)
    assert warning.startswith("WARNING: in so many passes")


def test_what_was_cut_and_skipped_is_told(tmp_path):
    lines = [{"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "bcdef"}]
    lines += [{"prompt": "a", "completion": "b"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Settings(train_file=str(tmp_path / "b.jsonl"), sequence_length=6, steps=1, truncate="left", batch_size=1)
    (note, _), *_ = notes(settings, tmp_path)
    assert note.endswith(
        "b.jsonl: 2 lines, 2 texts, 10 tokens (4 learned), 2 rows of 6, 83% full; 1 step of 1 row = 0.5 passes over "
        "the data; 1 line cut, which lost 3 tokens; 1 line longer than a row skipped, as line 2: its answer leaves no "
        "room for anything before it in a row (sequence_length=6)"
    )


def test_a_mixture_and_what_is_held_out(tmp_path):
    names = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 10, "y", 12)
    settings = Settings(train_file=names, mixture=(0.5, 3), sequence_length=12, batch_size=4, epochs=2)
    (*each, shares, total), *_ = notes(settings, tmp_path)
    assert [note.split(" (")[0] for note in each] == [
        f"train: {names[0]}: 30 lines, 30 texts, 180 tokens", f"train: {names[1]}: 10 lines, 10 texts, 120 tokens",
    ]  # fmt: skip
    assert shares == (  # 15 rows 0.5 times, of 37.5 in all, with 90 of 450 tokens
        f"an epoch has of {names[0]} 15 rows 0.5 times (20% of its rows, 20% of its tokens), {names[1]} 10 rows 3 "
        "times (80% of its rows, 80% of its tokens)"
    )
    assert total == (
        "train: together 40 lines, 40 texts, 300 tokens (260 learned), 25 rows of 12, 100% full; 19 steps of 4 rows = "
        "2.03 passes over the data (37.5 rows in a pass)"
    )
    settings = dataclasses.replace(settings, eval_fraction=0.3, eval_rows=2)
    told, data, held_out = notes(settings, tmp_path)
    assert held_out is not None
    assert sum(part.report.lines for part in (*data.parts, *held_out.parts)) == 40
    for note, name, part in zip(told[-3:-1], names, held_out.parts, strict=True):
        assert note.startswith(f"held out: {name}: {part.report.lines} lines, ")
        assert note.endswith("; not used are the fields id")
    assert told[-1].startswith(f"held out: together {sum(part.report.lines for part in held_out.parts)} lines, ")
    assert told[-1].endswith("% full; 2 of the rows are evaluated")
    # What counts is how often the lines of a file come, not how many epochs that takes.
    for mixture, rows, steps, warned in (
        ((0.1, 0.1), 4, 50, []),  # 80 epochs, in each of which is a tenth of the 25 rows
        ((30, 1), 4, 115, [f"WARNING: in so many passes over {names[0]} a model learns the lines"]),  # one epoch
        ((0.1, 3), 16, 1, [f"WARNING: a step takes 15.2381 rows, and a pass over {names[1]} has 10, so that it has"]),
    ):
        short = Settings(
            train_file=names, mixture=mixture, sequence_length=12, batch_size=rows, steps=steps, warmup_steps=0
        )
        told, *_ = notes(short, tmp_path)
        found = [line for line in told if line.startswith("WARNING")]
        assert len(found) == len(warned)
        assert all(line.startswith(begin) for line, begin in zip(found, warned, strict=True)), mixture
    # Lines that are in both.
    common = write(tmp_path / "c.jsonl", 33)
    settings = Settings(train_file=names, eval_file=(common, write(tmp_path / "d.jsonl", 5, "z")), sequence_length=12)
    told, *_ = notes(settings, tmp_path)
    assert told[-1].startswith("WARNING: of the 38 lines held out 30 are trained on, too, so that the held-out loss is")


def test_settings_of_data_are_compared_where_a_run_goes_on(tmp_path):
    settings = Settings(output=str(tmp_path), train_file=("a", "b"), mixture=(1, 2), epochs=1.5, eval_fraction=0.1)
    recorded = {"settings": json.loads(json.dumps(dataclasses.asdict(settings)))}
    check_settings(recorded, settings, 0)
    check_settings(recorded, dataclasses.replace(settings, train_file=("c", "d")), 0)  # their contents are compared
    for changes, told in (
        ({"mixture": (1, 3)}, "mixture=1,2 there, 1,3 here"),
        ({"eval_fraction": 0.2}, "eval_fraction=0.1 there, 0.2 here"),
        ({"truncate": "left"}, "truncate=stop there, left here"),
    ):
        with pytest.raises(ValueError, match=told):
            check_settings(recorded, dataclasses.replace(settings, **changes), 0)

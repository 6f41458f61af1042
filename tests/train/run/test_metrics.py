"""The numbers of a run: memory, operations, metrics files, TensorBoard's events, the curve."""

import dataclasses
import os
import struct
import time

import jax
import numpy as np
import pytest
from training_runs import CONFIG

import phi3_jax
from phi3_jax.train.data import Batch, Pair
from phi3_jax.train.run.flops import step_flops
from phi3_jax.train.run.memory import estimates
from phi3_jax.train.run.records import tensorboard
from phi3_jax.train.run.records.curve import moving_mean, save_curve, series
from phi3_jax.train.run.records.metrics import MetricsWriter, read
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import make_train_step, start


def test_memory_is_what_the_compiled_step_says():
    settings = Settings(train="all", batch_size=2, accumulation=2, sequence_length=32)
    params = phi3_jax.random_params(CONFIG)
    state, frozen = start(settings, CONFIG, params)
    leaf = np.zeros((2, 2, 32), np.int32)
    batch = Batch(leaf, leaf.astype(np.float32), leaf, leaf)
    compiled = make_train_step(settings, CONFIG).lower(state, frozen, batch).compile()
    found = estimates.estimate(compiled, state, frozen)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found.state == 3 * weights + 5 * 4  # both moments, and five counters
    assert found.frozen == 0
    assert found.saving == 2 * found.state
    assert found.working > weights  # the gradient is a part of it
    stats = compiled.memory_analysis()
    assert found.needed - found.saving == pytest.approx(
        found.state + stats.temp_size_in_bytes + 4 * leaf.nbytes + stats.generated_code_size_in_bytes, abs=4096
    )
    assert found.available == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=1)  # or less
    assert estimates.Estimate(4, 3, 2, 1, 10).fits
    assert not estimates.Estimate(4, 3, 2, 1, 9).fits
    assert estimates.Estimate(4, 3, 2, 1, None).fits


def test_operations_are_counted_token_by_token():
    T = 25
    positions = np.full((3, 2, T), -1)
    positions[0, 0, :11] = np.arange(11)
    positions[1, 1, :25] = np.arange(25)
    positions[2, 0, 3:20] = np.arange(17)
    blank = np.zeros_like(positions)
    batch = Batch(blank, blank, positions, blank)
    shapes = jax.tree.leaves_with_path(phi3_jax.random_params(CONFIG))
    matrices = sum(
        leaf.size for path, leaf in shapes if leaf.ndim > 1 and "embed" not in str(path) and "norm" not in str(path)
    )
    adapter = 3 * 5 * sum(sum(size) for size in ((24, 80), (48, 24), (24, 80), (40, 24)))
    linear = attention = 0
    for position in positions.reshape(-1).tolist():
        if position >= 0:
            linear += 1
            attention += 4 * 3 * 6 * 8 * min(position + 1, CONFIG.sliding_window)
    full, lora = Settings(train="all"), Settings(lora_rank=5)
    assert step_flops(full, CONFIG, batch) == 6 * matrices * linear + 3 * attention
    assert step_flops(lora, CONFIG, batch) == (4 * matrices + 6 * adapter) * linear + 3 * attention
    dpo = dataclasses.replace(full, method="dpo", pack=False)
    assert step_flops(dpo, CONFIG, Pair(batch, batch)) == pytest.approx(2 * (8 * matrices * linear + 4 * attention))


def test_metrics_are_cut_at_a_step(tmp_path):
    with MetricsWriter(tmp_path, -1) as metrics:
        for step in range(5):
            metrics.write({"step": step, "loss": float("inf") if step == 1 else step / 7})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert read(path) == [{"step": step, "loss": None if step == 1 else step / 7} for step in range(5)]
    with MetricsWriter(tmp_path, 3) as metrics:
        metrics.write({"step": 4, "loss": 0.5})
    assert path.read_text().splitlines() == [
        '{"step": 0, "loss": 0.0}',
        '{"step": 1, "loss": null}',
        f'{{"step": 2, "loss": {2 / 7}}}',
        f'{{"step": 3, "loss": {3 / 7}}}',
        '{"step": 4, "loss": 0.5}',
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


DAMAGED = [
    b'{"step": 1, "loss": 0.\x005}',
    b"\xff\xfe",
    b"[1]",
    b'{"step": "1"}',
    b'{"step": 1, "loss": "0.5"}',
    b'{"step": 1, "loss": [1]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b'{"step": 1.5}',
    b"",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_told_and_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 0, "loss": 2.0}', b'{"step": 2, "loss": 1.0, "eval_loss": null}']
    path.write_bytes(b"\n".join([good[0], line, good[1], b'{"step": 3, "l']))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: damaged, and left out: line 2$"):
        MetricsWriter(tmp_path, 7).__exit__()
    assert path.read_bytes() == b"\n".join([*good, b""])
    save_curve(read(path), tmp_path / "loss.png", "")


def test_events_are_those_of_tensorboard(tmp_path, monkeypatch):
    """Recorded with tensorboardX 2.6.5: record_writer.RecordWriter with Event protocol buffers."""
    monkeypatch.setattr(time, "time", lambda: 1.5)
    events = tensorboard.EventFile(tmp_path, 300)
    events.write(300, {"loss": 0.25, "é": -3e9})
    events.close()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.1.500000.")
    assert path.read_bytes().hex() == (
        "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a"
        "2600000000000000734fe30009000000000000f83f10ac022a180a0b0a046c6f7373150000803e0a090a02c3a9155ed032cf546385d2"
    )


def test_texts_are_those_of_tensorboard(tmp_path, monkeypatch):
    """Recorded with tensorboardX 2.6.5: summary.text in an Event, by record_writer.RecordWriter."""
    monkeypatch.setattr(time, "time", lambda: 1.5)
    events = tensorboard.EventFile(tmp_path, 0)
    events.write_texts(300, {"sample 1": "Tell é -> Tokyo."})
    events.close()
    (path,) = tmp_path.iterdir()
    assert (
        path.read_bytes()
        .hex()
        .endswith(
            "4e00000000000000c4b905ad09000000000000f83f10ac022a400a3e0a1573616d706c6520312f746578745f73756d6d617279421b0807"
            "120412020801421154656c6c20c3a9202d3e20546f6b796f2e4a080a060a0474657874a03ef57a"
        )
    )


def test_samples_are_cut_at_a_step(tmp_path):
    for step in (-1, 3):
        with MetricsWriter(tmp_path, step) as metrics:
            assert (step == -1) != (tmp_path / "samples.jsonl").exists()
            metrics.write_samples(step + 1, [])
            for later in range(step + 1, step + 6, 2):
                metrics.write_samples(later, [("a", f"é\n{later}"), ("a", "b")])
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"step": 1')
    assert [(line["step"], line["prompt"], line["answer"]) for line in read(tmp_path / "samples.jsonl")] == [
        (step, "a", answer) for step in (0, 2, 4, 6, 8) for answer in (f"é\n{step}", "b")
    ]
    with MetricsWriter(tmp_path, -1):
        assert not read(tmp_path / "samples.jsonl")


def test_the_mean_does_not_suffer_from_a_spike():
    """Nor does it take a minute for a hundred thousand steps."""
    values = [*np.random.default_rng(1).uniform(1, 3, 300).tolist(), 1e30, *[2.0] * 700]
    found, expected = moving_mean(values, 50), [np.mean(values[max(0, i - 49) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    begun = time.perf_counter()
    moving_mean([1.0] * 100_000, 5000)
    assert time.perf_counter() - begun < 10


def test_the_curve(tmp_path):
    records = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.0},
    ]
    assert series(records, "loss") == ([1, 3], [4.0, 2.0])
    assert moving_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 1.5, 3.0, 4.0]
    save_curve(records, tmp_path / "loss.png", "a run")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 672)
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]

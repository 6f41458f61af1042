"""What a run chooses where its settings say "auto", and what it advises: steps that were compiled for it."""

import dataclasses
import re
from fractions import Fraction

import jax
import pytest
from training_runs import CONFIG, write_run

import phi3_jax
from phi3_jax.quantization import quantize_params, quantized_shapes
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.memory import ahead, auto, estimates
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.settings import Resolved, Settings, change, resolved, with_few_rows


class Notes(Observer):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def compiled(monkeypatch):
    """Steps that take 100 bytes, and for each row 40, 20 or 10; what was compiled is in the list."""
    seen = []

    def pretend(settings, config, params, adapters=(None, None)):
        kept = {"none": 40, "dots": 20, "full": 10}[settings.remat] * settings.batch_size
        kept -= settings.loss_chunk < 1024
        state = 100 if settings.dtype == "float32" else 50
        seen.append((settings.remat, settings.batch_size, settings.accumulation, settings.loss_chunk))
        return ahead.Compiled(settings, (), object(), estimates.Estimate(state, 0, kept, 0, estimates.available()))

    monkeypatch.setattr(auto, "compile_step", pretend)
    return seen


@pytest.mark.parametrize(
    ("room", "changes", "chosen", "count"),
    [
        (10**9, [], ("none", 8, 1, 1024), 1),
        (419, [], ("dots", 8, 1, 1024), 2),
        (259, [], ("full", 8, 1, 1024), 3),
        (179, [], ("full", 4, 2, 1024), 4),
        (121, [], ("full", 2, 4, 1024), 4),  # with 4 rows half of what 8 take would be too much already
        (109, [], ("full", 1, 8, 256), 4),
        (50, [], ("full", 1, 8, 256), 2),  # the first shows that the state alone is too large
        (None, [], ("full", 1, 8, 256), 1),
        (180, ["accumulation=2"], ("dots", 4, 2, 1024), 2),
        (179, ["remat=none", "loss_chunk=0"], ("none", 1, 8, 0), 2),
        (259, ["batch_size=12"], ("full", 12, 1, 1024), 3),
        (200, ["batch_size=7", "accumulation=3", "remat=dots", "loss_chunk=9"], ("dots", 7, 3, 9), 1),
    ],
)
def test_the_first_step_that_fits_is_taken(compiled, monkeypatch, room, changes, chosen, count):
    monkeypatch.setattr(estimates, "available", lambda: room)
    settings = auto.choose_dtypes(change(Settings(), changes), Observer())
    found = auto.choose(settings, CONFIG, {}, Observer())
    s = found.settings
    assert (s.remat, s.batch_size, s.accumulation, s.loss_chunk) == chosen
    assert (s.dtype, s.compute_dtype) == ("float32", "float32")  # on the CPU
    assert len(compiled) == count
    if not changes:
        line = f"dtype float32, compute_dtype float32, remat {s.remat}, loss_chunk {s.loss_chunk}, "
        assert auto.told(Settings(), s) == f"{line}batch_size {s.batch_size} x accumulation {s.accumulation}"
    assert auto.told(s, s) == ""


def test_rows_are_shared_out_among_devices(compiled, monkeypatch):
    monkeypatch.setattr(estimates, "available", lambda: 1)
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    auto.choose(auto.choose_dtypes(Settings(), Observer()), CONFIG, {}, Observer())
    assert {rows for _, rows, _, _ in compiled} == {12, 6}
    few = auto.choose(auto.choose_dtypes(Settings(accumulation=5), Observer()), CONFIG, {}, Observer())
    assert few.settings.batch_size == 6


@pytest.mark.parametrize(
    ("changes", "room", "dtype", "compute_dtype"),
    [
        ([], 1, "bfloat16", "bfloat16"),
        (["dtype=float32"], 1, "float32", "bfloat16"),
        (["compute_dtype=float32"], 1, "bfloat16", "float32"),
        (["train=all"], 109, "float32", "bfloat16"),
        (["train=all"], 108, "bfloat16", "bfloat16"),
        (["train=all", "batch_size=2"], 118, "bfloat16", "bfloat16"),
        (["train=all"], None, "bfloat16", "bfloat16"),
    ],
)
def test_accelerators_compute_in_bfloat16(compiled, monkeypatch, tmp_path, changes, room, dtype, compute_dtype):
    phi3_jax.save(
        phi3_jax.Checkpoint(CONFIG, phi3_jax.random_params(CONFIG), None, phi3_jax.GenerationSettings()),
        tmp_path / "model",
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(estimates, "available", lambda: room)
    found = auto.choose_dtypes(change(Settings(checkpoint=str(tmp_path / "model")), changes), Observer())
    assert (found.dtype, found.compute_dtype) == (dtype, compute_dtype)


def test_few_data_make_small_steps(compiled, monkeypatch):
    """Whose rows are halved, too, where memory is short."""
    for epoch, rows in ((1, 1), (3, 2), (Fraction(7, 2), 2), (7, 4)):
        found = with_few_rows(Settings(), Fraction(epoch))
        assert (found.batch_size, found.accumulation) == (rows, 1)
    for settings in (Settings(batch_size=8), Settings(accumulation=1)):
        assert with_few_rows(settings, Fraction(3)) is settings
    assert with_few_rows(Settings(), Fraction(8)) == Settings()
    monkeypatch.setattr(estimates, "available", lambda: 1)
    auto.choose(
        auto.choose_dtypes(with_few_rows(Settings(), Fraction(5)), Observer()), CONFIG, {}, Observer(), may_halve=True
    )
    assert (compiled[0][1:3], compiled[-1][1:3]) == ((4, 1), (1, 4))
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    assert [with_few_rows(Settings(), Fraction(epoch)).batch_size for epoch in (1, 5, 6, 8, 9)] == [3, 3, 6, 6, "auto"]


def test_values_of_auto_are_read_and_refused():
    s = change(
        Settings(batch_size=3, remat="full"), ["batch_size=auto", "remat=auto", "loss_chunk=7", "dtype=bfloat16"]
    )
    assert (s.batch_size, s.remat, s.loss_chunk, s.dtype, s.accumulation) == ("auto", "auto", 7, "bfloat16", "auto")
    assert dataclasses.asdict(resolved(Settings(steps=3))) == dataclasses.asdict(Resolved(steps=3))
    for wrong in ("batch_size=0", "batch_size=some", "remat=all", "steps=auto", "accumulation=-1", "dtype=float16"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            change(Settings(), [wrong])


@pytest.mark.parametrize("policy", ["int4", "int8-g64-asymmetric"])
def test_shapes_are_those_of_rounded_weights(policy):
    rounded = quantize_params({"a": {"weight": jax.numpy.ones((2, 5, 70))}}, policy)
    like = quantized_shapes(policy, {"a/weight": jax.ShapeDtypeStruct((2, 5, 70), "float32")})
    assert rounded.keys() == {"a"}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), like["a/weight"]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), rounded["a"]["weight"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_advice_is_what_was_compiled_and_only_what_takes_less(monkeypatch):
    s = Resolved(sequence_length=64, remat="full", batch_size=1, loss_chunk=64, train="lora")
    params = ahead.params_like(CONFIG, "float32")
    found = ahead.compile_step(s, CONFIG, params)
    short = dataclasses.replace(found.memory, available=found.memory.needed - 1)
    monkeypatch.setattr(estimates, "available", lambda: short.available)
    measured = {}

    def measure(settings, config, params, adapters=(None, None)):
        changed = [
            f"{name}={value}" for name, value in dataclasses.asdict(settings).items() if value != getattr(s, name)
        ]
        result = ahead.compile_step(settings, config, params)
        measured[" ".join(changed)] = result.memory.needed
        return result

    monkeypatch.setattr(auto, "compile_step", measure)
    with pytest.raises(ValueError, match="does not fit; with a change it takes: ") as raised:
        auto.require_fit(dataclasses.replace(found, memory=short), CONFIG, params, Observer())
    said = re.findall(r"(\w+=\w+) [\d.]+ GB, fits", str(raised.value))
    less = {text: needed for text, needed in measured.items() if needed < short.needed}
    assert said == sorted(less, key=less.get)
    assert measured.keys() == {"quantize=int4", "dtype=bfloat16", "sequence_length=32"}
    assert less.keys() == {"quantize=int4", "sequence_length=32"}  # this CPU computes with a float32 copy of bfloat16


def test_advice_when_no_single_change_is_enough(monkeypatch):
    """Halving tokens or rows takes 30 less of 100, an adapter 20, and bfloat16 10 more."""
    monkeypatch.setattr(estimates, "available", lambda: 55 * 10**9)

    def pretend(s, config, params, adapters=(None, None)):
        needed = 100 - 30 * (s.sequence_length < 64) - 30 * (s.batch_size < 2) - 20 * (s.train == "lora")
        needed += 10 * (s.dtype == "bfloat16")
        return ahead.Compiled(s, (), object(), estimates.Estimate(0, 0, needed * 10**9, 0, estimates.available()))

    monkeypatch.setattr(auto, "compile_step", pretend)
    s = Resolved(sequence_length=64, batch_size=2, remat="full", loss_chunk=9, train="all", optimizer="lion")
    with pytest.raises(ValueError, match="does not fit") as raised:
        auto.require_fit(pretend(s, CONFIG, {}), CONFIG, {}, Observer())
    assert str(raised.value).split("takes: ")[1].split(", ") == [
        *("train=lora batch_size=1 accumulation=2 50.00 GB", "fits", "batch_size=1 accumulation=2 70.00 GB"),
        *("sequence_length=32 70.00 GB", "train=lora 80.00 GB"),
    ]
    s = dataclasses.replace(s, sequence_length=2, batch_size=1, train="lora", quantize="int4", method="dpo", pack=False)
    monkeypatch.setattr(estimates, "available", lambda: 1)
    with pytest.raises(ValueError, match="no change of its settings takes less: take a smaller checkpoint"):
        auto.require_fit(pretend(s, CONFIG, {}), CONFIG, {}, Observer())


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_tells_its_choices_and_goes_on_with_them(tmp_path, monkeypatch):
    s = write_run(tmp_path, batch_size="auto", accumulation="auto", steps=2, eval_file="", save_every=1)
    monkeypatch.setattr(estimates, "available", lambda: None)
    notes = Notes()
    train(s, notes, interrupt=lambda: True)
    line = "auto: dtype float32, compute_dtype float32, remat full, loss_chunk 256, batch_size 1 x accumulation 8"
    assert line in notes.lines
    monkeypatch.undo()  # now there is room for more
    again = Notes()
    assert train(s, again).step == 2
    assert line in again.lines
    with pytest.raises(ValueError, match="remat=full there, none here"):
        train(dataclasses.replace(s, remat="none"))

"""phi3-benchmark: the figures, the turns, the roofline by hand, and a run of ours on a tiny model."""

import contextlib
import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import phi3_jax
from phi3_jax.infer.benchmark.chart import save_chart
from phi3_jax.infer.benchmark.model import random_checkpoint
from phi3_jax.infer.benchmark.ours import Case as OurCase
from phi3_jax.infer.benchmark.peers import Peer, parse_peers
from phi3_jax.infer.benchmark.processes import Process, ours
from phi3_jax.infer.benchmark.roofline import Work, decode_work, least_seconds, prefill_work
from phi3_jax.infer.benchmark.rounds import Case, Result, Side, Spread, memory_needed, run_case, why_not
from phi3_jax.infer.programs import benchmark_main

CONFIG = phi3_jax.Phi3Config(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rope_theta=1e4,
)
# A peer that needs the seconds it is told to, and writes down what it is asked.
SCRIPT = """
import json, sys
count = 0
for line in sys.stdin:
    request = json.loads(line)
    with open(sys.argv[1], "a") as log:
        print(sys.argv[2], request["do"], len(request.get("rows", [])), request.get("new_tokens", ""), file=log)
    if request["do"] == "measure":
        count += 1
    if request["do"] == "break":
        sys.exit("it broke")
    reply = {"error": "no such thing"} if request["do"] == "refuse" else {"seconds": float(sys.argv[2 + count])}
    print(json.dumps(reply | {"note": "scripted", "token": 5}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path):
    """Starts peers that answer `measure` with given seconds; `log` has what they were asked, in order."""
    script, log = tmp_path / "peer.py", tmp_path / "log"
    script.write_text(SCRIPT)
    with contextlib.ExitStack() as stack:

        def start(*seconds):
            command = [sys.executable, str(script), str(log), *map(str, seconds)]
            return stack.enter_context(contextlib.closing(Process("scripted", command)))

        start.log = log
        yield start


class FakeMachine:
    """10 bytes and 4, 8, 100 operations per second."""

    rates = {"float32": 4.0, "bfloat16": 8.0, "int8": 100.0}  # noqa: RUF012

    def bandwidth(self) -> float:
        return 10.0


def test_spread():
    assert Spread.of([3.0, 1.0, 10.0, 4.0]) == Spread(3.5, 1.0, 10.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


def test_roofline_by_hand():
    # A layer: 32 inputs to 4 + 2 + 2 heads of 8, 32 back from 4 heads of 8, and 3 matrices of 32 x 64.
    layers, head = 3 * (32 * 64 + 32 * 32 + 3 * 32 * 64), 101 * 32
    assert prefill_work(CONFIG, 5, 7.0) == Work(7.0, 2 * (5 * layers + head), 4 * 3 * 4 * 8 * (1 + 2 + 3 + 4 + 5))
    # Two steps of three rows behind 9 tokens: 10 keys, then 11. A token has 2 x 3 x 2 x 8 = 96 numbers in the cache.
    seen = 3 * (10 + 11)
    expected = Work(2 * 7.0 + seen * 96 * 0.5, 2 * 3 * 2 * (layers + head), 4 * 3 * 4 * 8 * seen)
    assert decode_work(CONFIG, 9, 3, 2, 7.0, 0.5) == expected
    windowed = dataclasses.replace(CONFIG, sliding_window=4)
    assert decode_work(windowed, 9, 1, 2, 7.0, 1.0).bytes == 2 * 7.0 + (4 + 4) * 96
    assert prefill_work(windowed, 6, 0.0).attention == 4 * 3 * 4 * 8 * (1 + 2 + 3 + 4 + 4 + 4)


def test_least_seconds():
    rates = FakeMachine.rates
    assert least_seconds(Work(100.0, 1.0, 1.0), 10.0, rates, "float32") == 10.0  # memory decides
    assert least_seconds(Work(1.0, 800.0, 16.0), 10.0, rates, "bfloat16") == 102.0
    assert least_seconds(Work(1.0, 800.0, 16.0), 10.0, rates, "int8") == 10.0
    # A processor without bfloat16 computes it as float32.
    assert least_seconds(Work(1.0, 800.0, 16.0), 10.0, rates | {"bfloat16": 0.0}, "bfloat16") == 204.0


def test_every_round_measures_every_side_in_turn(scripted):
    sides = [
        Side("ours", scripted(2, 4, 2), 50.0, "int8", 1.0),
        Side("theirs", scripted(3, 2, 8), 100.0, "float32", 1.0),
    ]
    case = Case("decode", 6, batch=2, new_tokens=5)
    results, bandwidths = run_case(case, sides, CONFIG, 2, FakeMachine(), settle=0.0)
    asked = [line.split() for line in scripted.log.read_text().splitlines()]
    assert [line[1] for line in asked] == ["prepare"] * 2 + ["measure"] * 4 + ["release"] * 2
    assert [line[0] for line in asked] == ["2", "3"] * 4  # the first number that each was started with
    assert asked[0][2:] == ["2", "5"]
    ours_, theirs = results
    assert bandwidths == [10.0, 10.0]
    assert ours_.seconds == [4.0, 2.0]
    assert ours_.tokens_per_second == Spread(3.75, 2.5, 5.0)
    assert ours_.ratio is None
    # Rounds are compared one by one: 2 / 4 and 8 / 2.
    assert theirs.ratio == Spread(2.25, 0.5, 4.0)
    assert theirs.note == "scripted"
    work = decode_work(CONFIG, 6, 2, 5, 100.0, 1.0)
    least = least_seconds(work, 10.0, FakeMachine.rates, "float32")
    assert theirs.of_limit == Spread.of([least / 2, least / 8])


def test_sides_are_given_the_same_tokens():
    asked = []

    class Recorder:
        def ask(self, do, **request):
            asked.append((do, request))
            return {"seconds": 1.0}

    sides = [Side(name, Recorder(), 1.0, "int8", 1.0) for name in "ab"]
    run_case(Case("prefill", 50), sides, CONFIG, 1, settle=0.0)
    (_, first), (_, second) = asked[:2]
    assert first == second
    assert len(first["rows"]) == 1
    assert len(first["rows"][0]) == 50
    assert 60 < max(first["rows"][0]) < CONFIG.vocab_size


def test_a_process_that_fails_says_why(scripted):
    process = scripted(1)
    with pytest.raises(ValueError, match="scripted: no such thing"):
        process.ask("refuse")
    with pytest.raises(ValueError, match="exit code 1: it broke"):
        process.ask("break")


def test_cases_that_do_not_fit_are_left_out(monkeypatch):
    side = Side("a", None, 1.0, "int8", 2.0)
    assert memory_needed(Case("decode", 10, 4, 2), [side, side], CONFIG) == 2 * 4 * 12 * 96 * 2.0
    assert why_not(Case("decode", 250, 1, 5), [side], CONFIG) is None
    assert "context is 256" in why_not(Case("decode", 250, 1, 6), [side], CONFIG)
    monkeypatch.setattr("phi3_jax.infer.benchmark.rounds.available_memory", lambda: 9000.0)
    assert "GB are free" in why_not(Case("decode", 10, 4, 2), [side], CONFIG)


def test_peers_are_of_the_nearest_type():
    assert parse_peers(["llama_cpp", "transformers"], "float32", None) == [
        Peer("llama_cpp", "f32"),
        Peer("transformers", "float32"),
    ]
    assert [p.kind for p in parse_peers(["llama_cpp", "transformers"], "bfloat16", None)] == ["bf16", "bfloat16"]
    assert parse_peers(["llama_cpp"], "float32", "int8-g64") == [Peer("llama_cpp", "q8_0")]
    both = parse_peers(["llama_cpp", "llama_cpp:q4_k_m"], "float32", "int4-mixed")
    assert [(peer.name, peer.rate) for peer in both] == [("llama.cpp q4_0", "int8"), ("llama.cpp q4_k_m", "int8")]
    for wrong, message in [("vllm", "programs are"), ("llama_cpp:q3", "types of llama_cpp are"), ("x:y", "programs")]:
        with pytest.raises(ValueError, match=message):
            parse_peers([wrong], "float32", None)
    with pytest.raises(ValueError, match="twice"):
        parse_peers(["llama_cpp", "llama_cpp:f32"], "float32", None)


def test_random_weights_are_the_same_model_in_every_form(quick_compilation):
    floats = random_checkpoint(CONFIG, "float32")
    tokens = np.arange(20)[None] * 5
    expected = np.asarray(phi3_jax.Phi3(CONFIG).apply({"params": floats.params}, tokens))
    assert np.isfinite(expected).all()
    assert expected.std() > 1e-3
    first, second = np.asarray(floats.params["layers"]["mlp"]["down_proj"]["weight"])[:2]
    assert not np.array_equal(first, second)
    assert len(np.unique(first)) == 16
    for policy in ("int8", "int4", "int4-mixed"):
        integers = random_checkpoint(CONFIG, "float32", policy)
        kept = integers.params["layers"]["mlp"]["down_proj"]["weight"].dequantize()
        np.testing.assert_array_equal(kept[1], second)
        head = integers.params["lm_head"]["weight"]
        assert head.bits == (4 if policy == "int4" else 8)
        np.testing.assert_array_equal(head.dequantize(), floats.params["lm_head"]["weight"])


@pytest.mark.slow
def test_our_case_repeats_the_same_steps(quick_compilation):
    config = dataclasses.replace(CONFIG, initializer_range=0.3)  # large weights, so that the tokens differ
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    rows = np.random.default_rng(3).integers(0, 101, (2, 21)).tolist()
    expected = [each.token_ids for each in phi3_jax.infer.generate(model, rows, 6)]
    assert len(set(expected[0])) > 2
    case = OurCase(model, rows, 5, np.float32)
    assert case.compile_seconds > 0
    seconds, token = case.measure()
    compiled = case.compile_seconds
    assert seconds > 0
    # The first of the six tokens comes from reading.
    assert token == expected[0][5]
    assert case.measure()[1] == expected[0][5]
    assert case.compile_seconds == compiled
    assert np.asarray(case._state.tokens)[1, 21:27].tolist() == expected[1]
    assert case.cache_bytes == 4.0
    reading = OurCase(model, rows, 0, np.float32)
    for _ in range(2):
        # Nothing may be taken from the round before.
        reading._state = dataclasses.replace(reading._state, tokens=reading._state.tokens.at[:, 21:].set(7))
        assert reading.measure()[1] == expected[0][0]
    windowed = dataclasses.replace(model, config=dataclasses.replace(config, sliding_window=7))
    with pytest.raises(ValueError, match="ask for fewer"):
        OurCase(windowed, [[1] * 700], 600, np.float32)


@pytest.mark.slow
def test_our_process_answers(tmp_path):
    folder = tmp_path / "model"
    phi3_jax.save(random_checkpoint(CONFIG, "float32"), folder)
    spec = {"checkpoint": str(folder), "dtype": "float32"}
    with ours() as process:
        where = process.ask("platform", spec=spec)
        assert (where["platform"], where["dtype"]) == ("cpu", "float32")
        about = process.ask("load", spec=spec)
        assert about["free_bytes"] is None
        weights = sum(leaf.nbytes for leaf in random_weights())
        assert about["weight_bytes"] == weights - 101 * 32 * 4
        assert phi3_jax.Phi3Config.from_hf(about["config"]) == CONFIG
        side = Side("ours", process, about["weight_bytes"], "float32", about["cache_bytes"])
        (result,), _ = run_case(Case("decode", 17, 2, 3), [side], CONFIG, 2, settle=0.0)
        assert result.compile_seconds > 0
        assert len(result.seconds) == 2
        assert 50e6 < process.ask("memory")["peak_bytes"] < 4e9


def random_weights():
    return jax.tree.leaves(random_checkpoint(CONFIG, "float32").params)


def replies(platform: str, device: str) -> dict:
    """What our process says of itself."""
    load = {"weight_bytes": 1e5, "cache_bytes": 2.0, "config": CONFIG.to_hf(), "status": {"linear": "xla"}}
    return {
        "platform": {"platform": platform, "dtype": "float32"},
        "load": load
        | {"device": device, "free_bytes": None if platform == "cpu" else 3e4, "seconds": 0.25, "versions": {}},
        "memory": {"peak_bytes": 5e8},
    }


def stand_in(monkeypatch, asks, process):
    """Takes the place of our process."""

    class Scripted:
        def ask(self, do, **request):
            return asks[do] if do in asks else process.ask(do, **request)

    monkeypatch.setattr(benchmark_main.processes, "ours", lambda: contextlib.nullcontext(Scripted()))


def test_program_writes_figures_and_chart(tmp_path, capsys, monkeypatch, scripted):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    phi3_jax.save(random_checkpoint(CONFIG, "float32"), tmp_path / "tiny")
    stand_in(monkeypatch, replies("cpu", "cpu"), scripted(1.0, *[0.5] * 9))
    monkeypatch.setattr(benchmark_main, "why_unavailable", lambda: None)
    monkeypatch.setattr(benchmark_main, "library", lambda: None)
    monkeypatch.setattr(benchmark_main, "Machine", lambda library: FakeMachine())
    with flagsaver.flagsaver():
        flags.FLAGS(
            [
                "phi3-benchmark",
                "--checkpoint",
                str(tmp_path / "tiny"),
                "--dtype",
                "float32",
                "--prompt_lengths",
                "30,400",
                "--contexts",
                "20",
                "--batches",
                "1,2",
                "--new_tokens",
                "4",
                "--rounds",
                "2",
                "--json",
                str(tmp_path / "a.json"),
                "--chart",
                str(tmp_path / "a.png"),
            ]
        )
        assert benchmark_main.main() == 0
    out = capsys.readouterr().out
    assert "| prefill 30 | phi3_jax float32 | 60.00 | 60.00 - 60.00 |" in out
    assert "| decode at 20, batch 2 | phi3_jax float32 | 16.00 |" in out
    assert "| prefill 400 | left out: the model's context is 256 tokens |" in out
    assert "| phi3_jax float32 | 0.2 | 0.0 | 0.50 after 30 | 0.50 |" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["model"]["checkpoint"] == str(tmp_path / "tiny")
    assert [case["case"]["context"] for case in figures["cases"]] == [30, 400, 20, 20]
    assert figures["cases"][0]["sides"][0]["seconds"] == [0.5, 0.5]
    assert figures["cases"][0]["bandwidths"] == [10.0, 10.0]
    assert figures["machine"]["operations_per_second"] == FakeMachine.rates
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_an_accelerator_is_left_to_the_process_that_computes(tmp_path, capsys, monkeypatch, scripted):
    """The other one would take its memory; the limits are those that are published."""

    def refuse(*_):
        raise AssertionError("the accelerator was asked for")

    stand_in(monkeypatch, replies("gpu", "NVIDIA H100 80GB HBM3"), scripted(1.0, *[0.5] * 9))
    for name in ("default_backend", "devices", "local_devices", "device_put"):
        monkeypatch.setattr(jax, name, refuse)
    for name in ("Machine", "library", "why_unavailable"):
        monkeypatch.setattr(benchmark_main, name, refuse)
    given = {
        "prompt_lengths": 30,
        "contexts": 20,
        "batches": "1,9",
        "new_tokens": 4,
        "rounds": 2,
        "json": tmp_path / "a.json",
    }
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-benchmark", "--random=phi-4", *(f"--{name}={value}" for name, value in given.items())])
        assert benchmark_main.main() == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3; by its data sheet memory 3350 GB/s; bfloat16 989 Top/s" in out
    assert "| decode at 20, batch 9 | left out: the caches take 0.0 GB, and 0.0 GB are free |" in out
    assert "of phi3_jax it is the accelerator's" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["cases"][0]["bandwidths"][0] == 3.35e12
    assert figures["machine"]["operations_per_second"]["bfloat16"] == 989e12
    least = decode_work(CONFIG, 20, 1, 4, 1e5, 2.0).bytes / 3.35e12
    assert figures["cases"][1]["sides"][0]["of_limit"]["median"] == pytest.approx(least / 0.5)


def test_peers_on_the_cpu_are_not_compared_with_an_accelerator(monkeypatch, scripted):
    stand_in(monkeypatch, replies("tpu", "TPU v4"), scripted())
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-benchmark", "--random=phi-4", "--peers=llama_cpp"])
        with pytest.raises(ValueError, match="computes on the tpu: set JAX_PLATFORMS=cpu, or leave --peers out"):
            benchmark_main.main()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--work_dir", "x"], "needs --peers"),
        (["--random", "phi-4", "--checkpoint", "demo"], "not both"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--contexts", "4,x"], "not numbers from 1 to 1048576"),
        (["--batches", "0"], "not numbers from 1 to 4096"),
    ],
)
def test_senseless_flags_are_refused(args, message):
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-benchmark", *args])
        with pytest.raises(ValueError, match=message):
            benchmark_main.main()


def test_chart_has_a_bar_for_every_side(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    from matplotlib.axes import Axes

    drawn = []
    barh = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, row, width, **more: drawn.append(width) or barh(self, row, width, **more)
    )
    case = Case("prefill", 9)
    results = [
        Result(case, "ours", [1.0], Spread(9.0, 8.0, 11.0), Spread(0.5, 0.4, 0.6), None, 1.0, "", 1),
        Result(case, "theirs", [2.0], Spread(4.5, 4.0, 5.0), None, Spread(2.0, 1.9, 2.1), 0.0, "", 1),
    ]
    save_chart(results, tmp_path / "chart.png", "title", "subtitle", 5)
    assert drawn == [9.0, 4.5]
    assert (tmp_path / "chart.png").stat().st_size > 5000

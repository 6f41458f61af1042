"""Kills at random moments of quantising, exporting, answering and training: nothing half is taken for whole.

The next run of the same program works, what it writes is what a run without kills writes, and nothing else remains.
PHI3_FAULTS_KILLS=60 kills so often, instead of a few times.
"""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_folders import own_cache
from forked_programs import entries, forked
from templates import PHI4_MINI, small_tokenizer
from training_runs import CONFIG, tensors, untimed, write_data

import phi3_jax
from phi3_jax.train.run.records import read

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PHI3_FAULTS_KILLS", "8"))  # of all programs
IN_ROW = 3  # before a run that is not killed
# Some 20 MB, so that writing takes a while.
BIG = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    long_rope=None,
    sliding_window=None,
)


@dataclasses.dataclass
class Case:
    """A program, and what its output has to be.

    Attributes:
      name: of what it writes.
      result: what is compared of it.
    """

    module: str
    name: str
    arguments: list[str]
    result: Callable[[Path], object]
    goes_on: bool = False  # after a kill, and also where it was finished


def files(path: Path) -> object:
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    return path.read_bytes()


def run_of(folder: Path) -> object:
    metrics = json.dumps(untimed(read(folder / "metrics.jsonl")))
    adapter = {name: tensor.tobytes() for name, tensor in tensors(folder / "adapter").items()}
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    settings = json.loads((folder / "settings.json").read_text())["data"]
    return metrics, adapter, checkpoints, settings, sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("made")
    model = folder / "model"
    checkpoint = phi3_jax.Checkpoint(
        BIG, phi3_jax.random_params(BIG), small_tokenizer(PHI4_MINI), phi3_jax.GenerationSettings((257,))
    )
    phi3_jax.save(checkpoint, model)
    write_data(folder / "train.jsonl", 40, 1)
    write_data(folder / "eval.jsonl", 7, 2)
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(12)))
    given = ["--checkpoint", str(model)]
    # fmt: off
    settings = {
        "checkpoint": model, "eval_file": folder / "eval.jsonl", "sequence_length": 29, "batch_size": 2,
        "lora_rank": 3, "steps": 6, "warmup_steps": 2, "save_every": 1, "eval_every": 2, "samples": 0,
        "trackers": "csv",
    }
    told = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return {
        "quantize": Case("infer.programs.quantize_main", "int4", [*given, "--quantize", "int4", "--output"], files),
        "export": Case("infer.programs.export_main", "folder", [*given, "--format", "safetensors", "--output"], files),
        "gguf": Case("infer.programs.export_main", "a.gguf", [*given, "--format", "gguf", "--output"], files),
        "batch": Case(
            "infer.programs.generate_main", "out.jsonl",
            [*given, "--input", str(folder / "in.jsonl"), "--max_new_tokens", "5", "--batch_size", "2", "--output"],
            files,
        ),
        "train": Case(
            "train.programs.train_main", "run",
            [str(folder / "train.jsonl"), "--tell_every", "0", *told, "--set"], run_of, goes_on=True,
        ),
    }
    # fmt: on


@pytest.mark.parametrize("program", ["quantize", "export", "gguf", "batch", "train"])
def test_kills(cases, tmp_path, program):
    case, rng, killed = cases[program], random.Random(program), 0
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / case.name

    def arguments(path: Path) -> list[str]:
        prefix = "output=" if program == "train" else ""
        return [*case.arguments, f"{prefix}{path}"]

    with forked(f"phi3_jax.{case.module}", tmp_path / "log", own_cache(tmp_path)) as forks:
        expected, seconds = None, 0.0
        for _ in range(2):  # the first one compiles
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").mkdir()
            code, told, seconds = forks.run(*arguments(out))
            assert code == 0, told
            expected = case.result(out)
        wanted = entries(tmp_path / "out") if not case.goes_on else {case.name}
        moments = [0, 0]  # kills before there was something, and while there was
        for number in range(-(-KILLS // 5)):
            if number % IN_ROW == 0:
                shutil.rmtree(tmp_path / "out")
                (tmp_path / "out").mkdir()
            code = forks.kill(rng, tmp_path / "out", seconds, *arguments(out))
            assert code in (-9, 0) or out.exists(), (tmp_path / "log").read_text()
            killed += code == -9
            moments[bool(entries(tmp_path / "out"))] += code == -9
            if out.exists() and not case.goes_on:
                assert case.result(out) == expected  # whole
            if number % IN_ROW < IN_ROW - 1 and number + 1 < -(-KILLS // 5):
                continue
            if out.exists() and not case.goes_on:  # the next run in this folder has another name
                (tmp_path / "out" / case.name).unlink() if out.is_file() else shutil.rmtree(out)
            code, told, _ = forks.run(*arguments(out))
            assert code == 0, told
            assert case.result(out) == expected
            left = entries(tmp_path / "out") if not case.goes_on else set(os.listdir(tmp_path / "out"))
            assert left == wanted
    print(f"{program}: {killed} kills, {moments[1]} of them with something on the disk; a run takes {seconds:.1f} s")

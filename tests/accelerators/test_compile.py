"""Phi-3-mini's programs, compiled ahead of time for one TPU v5e, one v6e and one H100: `make test-accelerators`.

Nothing runs on an accelerator here. What is tested is what the compilers say: that they accept the programs, and how
much memory these take.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30
# What a program may use. The TPU compiler also keeps some memory for itself, and refuses by its own count.
MEMORY = {"v5e": 16 * GIB, "v6e": 32 * GIB, "h100": 80 * 10**9}
COMPILERS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax_cuda13_plugin"}
PROGRAMS = ["read", "answer", "decode", "step"]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module", params=list(MEMORY))
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if importlib.util.find_spec(COMPILERS[name]) is None:
        pytest.skip(f"{COMPILERS[name]} is not installed: make test-accelerators has an environment with it")
    return name


@pytest.fixture(scope="module")
def report(target: str, pytestconfig: pytest.Config) -> dict[str, Any]:
    # One process each: a compiler that gives up takes its process with it, and libtpu describes one machine at a time.
    script = Path(__file__).parent / "compile_target.py"
    run = subprocess.run([sys.executable, script, target], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"compiling for {target} failed:\n{run.stderr[-6000:]}"
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(_table(target, result["sizes"]))
    return result


def test_programs_are_as_many_as_the_readme_says(report: dict[str, Any]) -> None:
    assert report["programs"] == {"read": 1, "answer": 1, "decode": 1}
    count = NUMBERS[sum(report["programs"].values())]
    assert f"compiles {count} programs" in " ".join(README.read_text().split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_fits(report: dict[str, Any], target: str, program: str) -> None:
    size = report["sizes"][program]
    # All of the weights that the program reads are among the arguments: the embedding and 32 layers, or the head.
    assert size["arguments"] > (0.5 if program == "answer" else 7) * GIB
    assert size["arguments"] + size["outputs"] - size["aliased"] + size["temporaries"] < MEMORY[target]


@pytest.mark.parametrize("program", PROGRAMS)
def test_cache_stays_where_it_is(report: dict[str, Any], program: str) -> None:
    assert report["sizes"][program]["aliased"] >= report["cache"]


@pytest.mark.parametrize("program", ["decode", "step"])
def test_decoding_copies_no_cache(report: dict[str, Any], program: str) -> None:
    assert report["sizes"][program]["temporaries"] < 0.1 * GIB


def _table(target: str, sizes: dict[str, dict[str, float]]) -> str:
    columns = ["arguments", "outputs", "aliased", "temporaries"]
    lines = ["", f"{target + ', GiB':12}" + "".join(f"{column:>12}" for column in [*columns, "compiled"])]
    for program, size in sizes.items():
        cells = "".join(f"{size[column] / GIB:12.4f}" for column in columns)
        lines.append(f"{program:12}{cells}{size['seconds']:10.1f} s")
    return "\n".join(lines)

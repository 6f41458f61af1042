"""Phi-3-mini's programs, compiled ahead of time for one TPU v5e, one v6e and one H100: `make test-accelerators`.

Nothing runs on an accelerator here. What is tested is what the compilers say: that they accept the programs, and how
much memory these take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compiled
import pytest
from compiled import CASES, GIB, MEMORY, WHOLE

PROGRAMS = ["read", "answer", "decode", "step"]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module", params=[target for target in CASES if WHOLE in CASES[target]])
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def report(target: str, pytestconfig: pytest.Config) -> dict[str, Any]:
    result = compiled.report(target, WHOLE)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(_table(target, result["sizes"]))
    return result


def test_programs_are_as_many_as_the_readme_says(report: dict[str, Any]) -> None:
    # Of two runs, one greedy and one that draws, which is more than the readme's sentence about one.
    assert report["programs"] == {"read": 1, "answer": 1, "decode": 2}
    count, readme = NUMBERS[len(report["programs"])], " ".join(README.read_text().split())
    assert f"compiles {count} programs" in readme
    assert "`decode` for greedy rows and another for all other settings" in readme


@pytest.mark.parametrize("program", PROGRAMS)
def test_fits(report: dict[str, Any], target: str, program: str) -> None:
    size = report["sizes"][program]
    # All of the weights that the program reads are among the arguments: the embedding and 32 layers, or the head.
    assert size["arguments"] > (0.5 if program == "answer" else 7) * GIB
    assert size["arguments"] + size["outputs"] - size["aliased"] + size["temporaries"] < MEMORY[target]


@pytest.mark.parametrize("program", PROGRAMS)
def test_cache_stays_where_it_is(report: dict[str, Any], program: str) -> None:
    assert report["sizes"][program]["aliased"] >= report["cache"]


def _table(target: str, sizes: dict[str, dict[str, float]]) -> str:
    columns = ["arguments", "outputs", "aliased", "temporaries"]
    lines = ["", f"{target + ', GiB':12}" + "".join(f"{column:>12}" for column in [*columns, "compiled"])]
    for program, size in sizes.items():
        cells = "".join(f"{size[column] / GIB:12.4f}" for column in columns)
        lines.append(f"{program:12}{cells}{size['seconds']:10.1f} s")
    return "\n".join(lines)

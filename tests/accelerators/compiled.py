"""What the tests compile: the cases of each target, all of them in one process per target, two processes at a time."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

GIB, MIB = 2**30, 2**20
# What a program may use. The TPU compiler also keeps some memory for itself, and refuses by its own count.
MEMORY = {"h100": 80 * 10**9, "v5e": 16 * GIB, "v6e": 32 * GIB, "a100": 80 * 10**9}
COMPILERS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax_cuda13_plugin", "a100": "jax_cuda13_plugin"}
BATCHES, WEIGHTS = (1, 8, 64), ("bfloat16", "int8", "int4")

WHOLE = ""  # Phi-3-mini with all of its layers, one row, bfloat16
WHOLE_INTEGERS = "batch=8,weights=int4,programs=decode"
LOOPS = {(1, "int4"), (8, "bfloat16"), (64, "int8")}  # where the loop over tokens is compiled, too; else one step
DRAWN = "layers=2,batch=8,drawn=1,programs=decode+answer"
ADAPTED = [f"layers=2,batch=8,weights={weights},adapter=16,programs=step" for weights in ("bfloat16", "int4")]
INTEGER_CACHE = "batch=8,weights=int4,cache=int8,programs=step"
READS = [
    "layers=2,prompt=3900,answer=100,chunk=4096,programs=read",
    "layers=2,prompt=3900,answer=100,chunk=4096,weights=int4,programs=read",
    "layers=2,preset=phi-3-mini-128k,slots=131072,chunk=512,programs=read",
]


def turn(target: str, batch: int, weights: str) -> str:
    """The case of a token for so many rows: of few layers on a GPU, where each is compiled for itself.

    A TPU's program is as long with all of them, and what fits into its fast memory must not be the whole cache. With 64
    rows that is no danger, and all layers would need too much memory.
    """
    layers = "layers=2," if batch == 64 or target in ("h100", "a100") else ""
    programs = "decode+step" if (batch, weights) in LOOPS else "step"
    return f"{layers}batch={batch},weights={weights},programs={programs}"


def _cases(target: str) -> list[str]:
    whole = [WHOLE] if target != "a100" else []
    turns = [turn(target, batch, weights) for batch in BATCHES for weights in WEIGHTS]
    # A v6e's programs are made as a v5e's are: of what takes long to compile, one is enough.
    others = READS[-1:] if target == "v6e" else [*ADAPTED, INTEGER_CACHE, *READS]
    return [*whole, *([WHOLE_INTEGERS, DRAWN] if target == "h100" else []), *turns, *others]


CASES = {target: _cases(target) for target in MEMORY}

wanted = set[object]()  # targets of the tests that are run (conftest.py)
_pool = ThreadPoolExecutor(max_workers=2)


def report(target: str, case: str) -> dict[str, Any]:
    """What compile_target.py says of a case; skips the test where the target's compiler is not installed."""
    if importlib.util.find_spec(COMPILERS[target]) is None:
        pytest.skip(f"{COMPILERS[target]} is not installed: make test-accelerators has an environment with it")
    run = _runs()[target].result()
    number, lines = CASES[target].index(case), run.stdout.splitlines()
    assert number < len(lines), f"compiling {case or 'the usual case'} for {target} failed:\n{run.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(lines[number])
    assert "error" not in found, f"compiling {case or 'the usual case'} for {target} failed:\n{found['error']}"
    return found


@functools.cache
def _runs() -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """Starts all targets that are wanted at the first question, in the order of CASES."""
    targets = (target for target in CASES if target in wanted and importlib.util.find_spec(COMPILERS[target]))
    return {target: _pool.submit(_compile, target) for target in targets}


def _compile(target: str) -> subprocess.CompletedProcess[str]:
    # One process each: a compiler that gives up takes its process with it, and libtpu describes one machine at a time.
    command = [sys.executable, str(Path(__file__).parent / "compile_target.py"), target, *CASES[target]]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)

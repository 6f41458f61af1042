"""Attention and the cache on an H100, compiled ahead of time: `make test-accelerators`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax_cuda13_plugin is not installed: make test-accelerators has an environment with it")
    script = Path(__file__).parent / "compile_attention.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-6000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def test_no_layer_of_the_cache_is_copied(report: dict[str, Any]) -> None:
    assert len(report) == 4
    for name, program in report.items():
        assert program["kernels"] > 0, name
        assert program["written"] == [], name


def test_a_chunk_at_128k_slots_stores_no_scores(report: dict[str, Any]) -> None:
    assert report["chunk at 128k"]["temporaries"] < 0.5 * GIB

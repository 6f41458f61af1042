"""The TPU kernels at the family's sizes, compiled ahead of time for one v5e and one v6e: `make test-accelerators`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test-accelerators has an environment with it",
)


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_kernels_are_accepted_and_take_no_memory(target: str) -> None:
    """The compiler refuses blocks of wrong shapes, and those that do not fit into a TPU's vector memory."""
    script = Path(__file__).parent / "compile_tpu_kernels.py"
    run = subprocess.run([sys.executable, script, target], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"compiling for {target} failed:\n{run.stderr[-6000:]}"
    temporaries = json.loads(run.stdout.splitlines()[-1])
    assert len(temporaries) > 10
    # Neither a layer of the cache (9 MiB and more), nor a matrix (from 12 MiB on), nor scores.
    assert {name: size for name, size in temporaries.items() if size > 2**20} == {}

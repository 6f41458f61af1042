"""The recipes' memory, compiled ahead of time for two NVIDIA cards, beside what they say: `make test-accelerators`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What a program may use: by default JAX takes three quarters of a card's memory.
MEMORY = {"h100": 0.75 * 80e9, "rtx4090": 0.75 * 24e9}
MODELS = {"lora_phi3_mini": "phi-3-mini-4k", "qlora_phi4": "phi-4"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax_cuda13_plugin is not installed: make test-accelerators has an environment with it",
)


@pytest.mark.parametrize("recipe", list(MODELS))
@pytest.mark.parametrize("target", list(MEMORY))
def test_a_recipe_takes_what_it_says(target: str, recipe: str) -> None:
    said = re.search(
        r"^Memory: ([\d.]+) GB", importlib.import_module(f"phi3_jax.train.recipes.{recipe}").__doc__ or "", re.M
    )
    assert said is not None
    needed = _compiled(target, MODELS[recipe], recipe)["needed"]
    assert needed == pytest.approx(float(said[1]) * 1e9, rel=0.05)
    assert needed < MEMORY[target]


def test_integers_take_less_than_floats_without_remat() -> None:
    changes = ("sequence_length=512", "accumulation=1", "remat=none")
    floats = _compiled("h100", "phi-3-mini-4k", "lora_phi3_mini", *changes)
    integers = _compiled("h100", "phi-3-mini-4k", "lora_phi3_mini", *changes, "quantize=int4")
    # One matrix at a time is floats.
    assert integers["working"] < floats["working"] + 0.2e9
    assert integers["needed"] < 0.6 * floats["needed"]


@functools.cache
def _compiled(*arguments: str) -> dict[str, Any]:
    script = Path(__file__).parent / "compile_training.py"
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"compiling {arguments} failed:\n{run.stderr[-6000:]}"
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result

"""Compiles a step of training for one accelerator that this machine need not have; prints JSON.

    python compile_training.py h100 phi-3-mini-4k lora_phi3_mini remat=none quantize=int4

The arguments are a target of compile_target.py, a preset, a recipe or "-" for the defaults, and changes of its settings.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

from compile_target import PLATFORMS, topology  # before jax is imported

import jax
import numpy as np
from jax.sharding import Mesh

import phi3_jax
from phi3_jax.train import sharding
from phi3_jax.train.run import ahead, memory
from phi3_jax.train.settings import Settings, change


def main(target: str, preset: str, recipe: str, *changes: str) -> None:
    known = Settings() if recipe == "-" else importlib.import_module(f"phi3_jax.train.recipes.{recipe}").SETTINGS
    settings, config = change(known, changes), phi3_jax.PRESETS[preset]
    jax.default_backend = lambda: PLATFORMS[target]
    mesh = Mesh(np.asarray(topology(target).devices), ("devices",))
    sharding.make_mesh = lambda: mesh
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = ahead.params_like(config, settings.dtype, settings.quantize)
        step, like = ahead.compile_step(settings, config, params)
    found = memory.estimate(step, *like)
    sizes = {"state": found.state, "frozen": found.frozen, "working": found.working}
    temporaries = step.memory_analysis().temp_size_in_bytes
    print(json.dumps(sizes | {"temporaries": temporaries, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main(*sys.argv[1:])

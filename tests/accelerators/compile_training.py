"""Compiles a step of training for one accelerator that this machine need not have; prints JSON.

    python compile_training.py h100 phi-3-mini-4k lora_phi3_mini remat=none quantize=int4

The arguments are a target of compile_target.py, a preset, a recipe or "-" for the defaults, and changes of its
settings.
"""

from __future__ import annotations

# isort: off
from compile_target import PLATFORMS, topology  # before jax: it sets what jax reads when it is imported

# isort: on
import importlib
import json
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh

import phi3_jax
from phi3_jax.train import sharding
from phi3_jax.train.run.memory import ahead
from phi3_jax.train.settings import Settings, change, resolved


def main(target: str, preset: str, recipe: str, *changes: str) -> None:
    """Prints one line of JSON."""
    known = Settings() if recipe == "-" else importlib.import_module(f"phi3_jax.train.recipes.{recipe}").SETTINGS
    settings, config = resolved(change(known, changes)), phi3_jax.PRESETS[preset]
    jax.default_backend = lambda: PLATFORMS[target]
    mesh = Mesh(np.asarray(topology(target).devices), ("devices",))
    sharding.make_mesh = lambda: mesh
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = ahead.params_like(config, settings.dtype, settings.quantize)
        found = ahead.compile_step(settings, config, params).memory
    assert found is not None
    sizes = {"needed": found.needed - found.saving, "state": found.state, "frozen": found.frozen}
    print(json.dumps(sizes | {"working": found.working, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles a step of training for one accelerator that this machine need not have; prints JSON.

    python compile_training.py h100 phi-3-mini-4k lora_phi3_mini remat=none quantize=int4

The arguments are a target of compile_target.py, a preset, a recipe or "-" for the defaults, and changes of its
settings; "layers=2" makes the model shorter. The compiler needs no cuDNN, but JAX asks for its version.
"""

from __future__ import annotations

# isort: off
from compile_target import PLATFORMS, topology  # before jax: it sets what jax reads when it is imported

# isort: on
import dataclasses
import importlib
import json
import re
import sys
import time
import types

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh

import phi3_jax
from phi3_jax.train import sharding
from phi3_jax.train.run.memory import ahead
from phi3_jax.train.settings import Settings, change, resolved


def main(target: str, preset: str, recipe: str, *changes: str) -> None:
    """Prints one line of JSON."""
    known = Settings() if recipe == "-" else importlib.import_module(f"phi3_jax.train.recipes.{recipe}").SETTINGS
    layers = [int(each.removeprefix("layers=")) for each in changes if each.startswith("layers=")]
    settings = resolved(change(known, [each for each in changes if not each.startswith("layers=")]))
    config = phi3_jax.PRESETS[preset]
    config = dataclasses.replace(config, num_hidden_layers=layers[0]) if layers else config
    jax.default_backend = lambda: PLATFORMS[target]
    fused_attention_stablehlo.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: 91800)
    mesh = Mesh(np.asarray(topology(target).devices), ("devices",))
    sharding.make_mesh = lambda: mesh
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = ahead.params_like(config, settings.dtype, settings.quantize)
        compiled = ahead.compile_step(settings, config, params)
    found, text = compiled.memory, compiled.step.as_text() if compiled.step else ""
    assert found is not None
    sizes = {"needed": found.needed - found.saving, "state": found.state, "frozen": found.frozen}
    calls = re.findall(r"__cudnn\$\w+|splash_mha_[a-z]+", text)
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    seen = {"calls": sorted(set(calls)), "shapes": sorted(shapes)}
    print(json.dumps(sizes | seen | {"working": found.working, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles the programs of text generation for one accelerator that this machine need not have; prints JSON.

    python compile_target.py v5e

Nothing is executed and no weight is made: a `Run` is advanced with stand-ins in place of the jitted functions of
decoding.py, which note the shapes that they are called with. Those programs are then compiled for the target, by
libtpu or by XLA's compiler for NVIDIA. The sizes are those compilers' own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before jax is imported: the host computes, and libtpu must neither look for a TPU nor ask the cloud which one it is.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import phi3_jax
from phi3_jax.infer import Run, Sampling
from phi3_jax.infer.engine import decoding
from phi3_jax.model import parameter_shapes

PRESET = "phi-3-mini-4k"
PROMPT, ANSWER = 1024, 128  # tokens: two chunks of prefill, and a cache of 1152 slots
PLATFORMS = {"v5e": "tpu", "v6e": "tpu", "h100": "gpu", "rtx4090": "gpu"}
Program = tuple[Any, tuple[Any, ...]]  # a jitted function and the shapes of its arguments


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Stands in for a jitted function: notes its arguments' shapes under `name`.

    Its result is the state as it came, and zeros for whatever else there is.
    """

    name: str
    function: Any
    programs: dict[str, list[Program]]

    def lower(self, *args: Any) -> Recorder:
        return self

    def compile(self) -> None:
        return None

    def __call__(self, *args: Any) -> Any:
        shapes = jax.tree.map(_abstract, args)
        seen = self.programs.setdefault(self.name, [])
        if shapes not in [known for _, known in seen]:
            seen.append((self.function, shapes))
        (state,) = (each for each in args if isinstance(each, decoding.DecodeState))

        def stand_in(part: Any) -> Any:
            return state if isinstance(part, decoding.DecodeState) else jnp.zeros(part.shape, part.dtype)

        result = self.function.eval_shape(*args)
        return jax.tree.map(stand_in, result, is_leaf=lambda part: isinstance(part, decoding.DecodeState))


def recorded_programs(platform: str) -> dict[str, list[Program]]:
    """The programs, by function, that are run on a platform for prompts of one padded length."""
    config = phi3_jax.PRESETS[PRESET]
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in parameter_shapes(config).items()}
    params = flax.traverse_util.unflatten_dict(shapes, sep="/")
    checkpoint = phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings(eos_token_ids=(32000, 32007)))
    programs: dict[str, list[Program]] = {}
    jax.default_backend = lambda: platform  # what the cache's shape depends on
    jitted = {name: value for name, value in vars(decoding).items() if isinstance(value, jax.stages.Wrapped)}
    for name, function in jitted.items():
        setattr(decoding, name, Recorder(name, function, programs))
    for prompt, answer, sampling in [(PROMPT, ANSWER, Sampling()), (PROMPT - 7, ANSWER - 9, Sampling(0.7, top_p=0.9))]:
        run = Run(checkpoint, [[1] * prompt], [answer], [sampling])
        for _ in range(4):  # two chunks of the prompt, and the loop twice
            run.advance(32)
    for name, function in jitted.items():
        setattr(decoding, name, function)
    return programs


def topology(target: str) -> Any:
    """A description of the one device."""
    if PLATFORMS[target] == "tpu":
        return topologies.get_topology_desc(f"{target}:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1))
    description = (Path(__file__).parent / f"{target}.txtpb").read_text()
    return topologies.get_topology_desc(target, platform="cuda", target_config=description, topology="1x1x1")


def compiled_sizes(program: Program, sharding: NamedSharding) -> dict[str, float]:
    """Compiles, and returns bytes and seconds."""
    function, shapes = program

    def place(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(sharding=sharding) if is_array else leaf

    begin = time.perf_counter()
    compiled: Any = function.lower(*jax.tree.map(place, shapes)).compile()
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": time.perf_counter() - begin,
    }


def main(target: str) -> None:
    programs = recorded_programs(PLATFORMS[target])
    counts = {name: len(known) for name, known in programs.items()}
    _, (config, params, state, *_) = programs["decode"][0]
    programs["step"] = [(decoding.step, (config, params, state))]
    sharding = NamedSharding(Mesh(np.asarray(topology(target).devices), ("x",)), PartitionSpec())
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        sizes = {name: compiled_sizes(known[0], sharding) for name, known in programs.items()}
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    print(json.dumps({"programs": counts, "cache": cache, "sizes": sizes}))


def _abstract(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf  # a static argument
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


if __name__ == "__main__":
    main(sys.argv[1])

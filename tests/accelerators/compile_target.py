"""Compiles the programs of text generation for one accelerator that this machine need not have; prints JSON.

    python compile_target.py v5e
    python compile_target.py h100 layers=2,batch=8,weights=int4,programs=decode layers=2,programs=read,hlo=/tmp/folder

Each argument after the target is a case: changes of `Case` below. A line of JSON is printed for each; "hlo" names a
folder for the compiled programs' text. One process compiles for one target only.

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

import contract
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import phi3_jax
from phi3_jax import adapters
from phi3_jax.checkpoint import placement
from phi3_jax.infer import Options, Run, Sampling
from phi3_jax.infer.engine import buckets, decoding
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.model import KVCache, parameter_shapes
from phi3_jax.quantization import quantized_shapes

PLATFORMS = {"v5e": "tpu", "v6e": "tpu", "h100": "gpu", "a100": "gpu", "l4": "gpu", "rtx4090": "gpu"}
MEMORY = {"v5e": 16, "v6e": 32, "h100": 80, "a100": 80, "l4": 24, "rtx4090": 24}  # GB
Program = tuple[Any, tuple[Any, ...]]  # a jitted function and the shapes of its arguments


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
      layers: how many; 0: the preset's.
      batch: rows.
      weights: "bfloat16", or a policy of quantization/policy.py: "int8", "int4", "int4-g64-asymmetric".
      prompt, answer: tokens. The usual ones take two chunks of prefill, and a cache of 1152 slots.
      chunk: tokens of a prompt that are read at a time.
      slots: for how many tokens a row has memory; 0: what prompt and answer need.
      cache: the dtype of the cache; "": the usual one.
      adapter: the rank of a LoRA adapter that is attached to all matrices; 0: none.
      drawn: 1 for the programs of rows that draw with all settings, 0 for those of greedy rows.
      programs: which, with + between them; "": all.
      hlo: a folder for the compiled programs' text; "": none.
    """

    preset: str = "phi-3-mini-4k"
    layers: int = 0
    batch: int = 1
    weights: str = "bfloat16"
    prompt: int = 1024
    answer: int = 128
    chunk: int = 512
    slots: int = 0
    cache: str = ""
    adapter: int = 0
    drawn: int = 0
    programs: str = ""
    hlo: str = ""

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads "layers=2,batch=8". Raises ValueError for what is no attribute or no number."""
        given = dict(each.split("=", 1) for each in text.split(",") if each)
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if unknown := given.keys() - kinds.keys():
            raise ValueError(f"a case has {', '.join(kinds)}, not {', '.join(sorted(unknown))}")
        return cls(**{name: kinds[name](value) for name, value in given.items()})

    @property
    def config(self) -> phi3_jax.Phi3Config:
        config = phi3_jax.PRESETS[self.preset]
        return dataclasses.replace(config, num_hidden_layers=self.layers or config.num_hidden_layers)


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


def params_like(case: Case) -> Any:
    """The parameters that a load gives on the platform, as shapes."""
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in parameter_shapes(case.config).items()}
    leaves = shapes if case.weights == "bfloat16" else quantized_shapes(case.weights, shapes)
    layout = placement.fastest_layout()
    leaves = {path: _as_loaded(path, leaf, layout) for path, leaf in leaves.items()}
    params = flax.traverse_util.unflatten_dict(leaves, sep="/")
    if layout == "layers":
        from phi3_jax.kernels.linear import per_layer

        params = jax.eval_shape(per_layer.split_layers, params)
    if not case.adapter:
        return params
    lora = adapters.LoraConfig(case.adapter, 2.0 * case.adapter)

    def attached(params: Any) -> Any:
        return adapters.attach(params, adapters.init_adapter(case.config, lora, jax.random.key(0)), lora)

    return jax.eval_shape(attached, params)


def _as_loaded(path: str, leaf: Any, layout: str) -> Any:
    if not isinstance(leaf, QuantizedTensor) or not hasattr(placement, "compute_dtype"):
        return leaf
    leaf = dataclasses.replace(leaf, compute=placement.compute_dtype("bfloat16"))
    return jax.eval_shape(QuantizedTensor.by_columns, leaf) if layout == "columns" and path != placement.TABLE else leaf


def recorded_programs(case: Case) -> dict[str, list[Program]]:
    """The programs, by function, that are run for prompts of one padded length."""
    settings = phi3_jax.GenerationSettings(eos_token_ids=(32000, 32007))
    checkpoint = phi3_jax.Checkpoint(case.config, params_like(case), None, settings)
    programs: dict[str, list[Program]] = {}
    jitted = {name: value for name, value in vars(decoding).items() if isinstance(value, jax.stages.Wrapped)}
    for name, function in jitted.items():
        setattr(decoding, name, Recorder(name, function, programs))
    create, KVCache.create = KVCache.create, _cache_like(KVCache.create)  # type: ignore[method-assign]
    options = Options(prefill_chunk=case.chunk, room=case.slots, cache_dtype=case.cache or None)
    for shorter, sampling in [(0, Sampling()), (7, Sampling(0.7, top_p=0.9))]:
        prompts, limits = [[1] * (case.prompt - shorter)] * case.batch, [case.answer - shorter] * case.batch
        run = Run(checkpoint, prompts, limits, [sampling] * case.batch, options)
        run.advance(32)
        while run.reading[0] < run.reading[1]:
            run.advance(32)
        for _ in range(2):  # the loop
            run.advance(32)
    KVCache.create = create  # type: ignore[method-assign]
    for name, function in jitted.items():
        setattr(decoding, name, function)
    return programs


def topology(target: str) -> Any:
    """A description of the one device."""
    if PLATFORMS[target] == "tpu":
        return topologies.get_topology_desc(f"{target}:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1))
    description = (Path(__file__).parent / f"{target}.txtpb").read_text()
    return topologies.get_topology_desc(target, platform="cuda", target_config=description, topology="1x1x1")


def compiled(program: Program, sharding: NamedSharding) -> tuple[dict[str, float], str]:
    """Compiles -> (bytes and seconds, the compiled program's text)."""
    function, shapes = program

    def place(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(sharding=sharding) if is_array else leaf

    begin = time.perf_counter()
    result: Any = function.lower(*jax.tree.map(place, shapes)).compile()
    memory = result.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": time.perf_counter() - begin,
    }
    return sizes, result.as_text()


def report(case: Case, sharding: NamedSharding) -> dict[str, Any]:
    """Compiles the programs of a case -> what is known of them, for JSON."""
    programs = recorded_programs(case)
    counts = {name: len(known) for name, known in programs.items()}
    _, (config, params, state, *_) = programs["decode"][0]
    programs["step"] = [(decoding.step, (config, params, state))]
    found: dict[str, Any] = {}
    for name in case.programs.split("+") if case.programs else programs:
        # Greedy rows are recorded first; where they have no program of their own, there is one.
        sizes, text = compiled(programs[name][min(case.drawn, len(programs[name]) - 1)], sharding)
        tokens, has_logits = case.chunk if name == "read" else 1, name in ("answer", "decode")
        found[name] = sizes | contract.facts(text, config, params, state.cache, case.batch, tokens, has_logits)
        if case.hlo:
            Path(case.hlo).mkdir(parents=True, exist_ok=True)
            (Path(case.hlo) / f"{name}.hlo").write_text(text)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    return {"case": dataclasses.asdict(case), "programs": counts, "cache": cache, "sizes": found}


def main(target: str, *cases: str) -> None:
    """Prints a line of JSON for each case, for the usual one if none is given."""
    jax.default_backend = lambda: PLATFORMS[target]  # what kernels and the cache's shape depend on
    buckets._memory = lambda: MEMORY[target] * 750_000_000  # and the room: by default JAX takes three quarters
    sharding = NamedSharding(Mesh(np.asarray(topology(target).devices), ("x",)), PartitionSpec())
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        for case in cases or ("",):
            try:
                found = report(Case.parse(case), sharding)
            except (
                jax.errors.JaxRuntimeError,
                NotImplementedError,
                ValueError,
            ) as error:  # no room on a TPU, or refused
                found = {"case": case, "error": f"{type(error).__name__}: {error}"[:3000]}
            print(json.dumps(found), flush=True)


def _cache_like(create: Any) -> Any:
    """KVCache.create that makes shapes: a whole cache of a large batch would not fit into this machine."""
    return lambda *args, **options: jax.eval_shape(lambda: create(*args, **options))


def _abstract(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf  # a static argument
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


if __name__ == "__main__":
    main(*sys.argv[1:])

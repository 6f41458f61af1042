"""Compiles a step of decoding and a chunk of a prompt for an H100 that this machine need not have; prints JSON.

    python compile_attention.py

Two layers of Phi-3-mini, whose cache is the argument that counts. For each program: its temporaries in bytes, the bytes
of a layer's keys, and the instructions that make an array of so many bytes over the cache's slots, our kernels aside.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import phi3_jax
from phi3_jax.model import KVCache, Phi3, parameter_shapes

PROGRAMS = {  # name: (preset, batch, tokens, slots, type of the cache)
    "batch 8": ("phi-3-mini-4k", 8, 1, 1152, "bfloat16"),
    "batch 64": ("phi-3-mini-4k", 64, 1, 1152, "bfloat16"),
    "batch 8, int8": ("phi-3-mini-4k", 8, 1, 1152, "int8"),
    "chunk at 128k": ("phi-3-mini-128k", 1, 512, 131072, "bfloat16"),
}
RESULT = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shapes>\(?[a-z0-9]+\[.*?) (?P<operation>[\w-]+)\(", re.M)
SHAPE = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier"}


def written(text: str, slots: int, least: int) -> list[str]:
    """Instructions of an HLO text whose result is an array of at least so many bytes with an axis of so many slots.

    Those that only name another's result do not count.
    """
    found = []
    for line in RESULT.finditer(text):
        if line["operation"] in FREE or "phi3_cuda" in text[line.start() : text.find("\n", line.end())]:
            continue
        for shape in SHAPE.finditer(line["shapes"]):
            sizes = [int(size) for size in shape["sizes"].split(",") if size]
            if slots in sizes and math.prod(sizes) * (int(shape["bits"] or 8) // 8) >= least:
                found.append(f"{shape[0]} {line['operation']} {line['name']}")
    return found


def compiled(name: str, sharding: NamedSharding) -> Any:
    """The compiled program and the bytes of one layer's keys."""
    preset, batch, tokens, slots, dtype = PROGRAMS[name]
    config = dataclasses.replace(phi3_jax.PRESETS[preset], num_hidden_layers=2)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in parameter_shapes(config).items()}
    params = jax.tree.map(place, flax.traverse_util.unflatten_dict(shapes, sep="/"))
    cache = jax.tree.map(place, jax.eval_shape(lambda: KVCache.create(config, batch, slots, dtype)))
    ids = place(jax.ShapeDtypeStruct((batch, tokens), jnp.int32))

    def step(params: Any, ids: jax.Array, cache: KVCache) -> Any:
        logits, cache = Phi3(config).apply({"params": params}, ids, cache=cache)
        return logits[:, -1].argmax(axis=-1), cache

    layer = cache.k.size // 2 * cache.k.dtype.itemsize
    return jax.jit(step, donate_argnums=2).lower(params, ids, cache).compile(), layer


def main() -> None:
    description = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=description, topology="1x1x1")
    jax.default_backend = lambda: "gpu"  # what kernels are chosen by
    sharding = NamedSharding(Mesh(np.asarray(topology.devices), ("x",)), PartitionSpec())
    result = {}
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        for name in PROGRAMS:
            program, layer = compiled(name, sharding)
            text = program.as_text()
            result[name] = {
                "temporaries": program.memory_analysis().temp_size_in_bytes,
                "layer": layer,
                "kernels": len(re.findall(r'custom_call_target="phi3_cuda_(?:attention|cache_write)"', text)),
                "written": written(text, PROGRAMS[name][3], layer),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

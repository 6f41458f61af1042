"""Compiles products with integers for one accelerator that this machine need not have; prints JSON.

    python compile_products.py h100

For each number of bits and of rows: bytes of temporaries, and the names of what is called.
"""

from __future__ import annotations

# isort: off
from compile_target import PLATFORMS, topology  # before jax: it sets what jax reads when it is imported

# isort: on
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear import gated, linear

OUTPUTS, INPUTS, GROUP = 16384, 3072, 32  # Phi-3-mini's gate and up
FUNCTIONS = {"linear": linear, "gated": gated}


def main(target: str) -> None:
    """Prints one line of JSON."""
    jax.default_backend = lambda: PLATFORMS[target]
    sharding = NamedSharding(Mesh(np.asarray(topology(target).devices), ("x",)), PartitionSpec())

    def of(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    found = {}
    for bits, rows, (name, function) in [
        (bits, rows, each) for bits in (4, 8) for rows in (1, 8, 64, 512) for each in FUNCTIONS.items()
    ]:
        scales = of((OUTPUTS, INPUTS // GROUP), jnp.float16)
        weight = QuantizedTensor(of((OUTPUTS, INPUTS * bits // 8), jnp.uint8), scales, None, bits, INPUTS)
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            program = jax.jit(lambda x, w, function=function: function(x, w) + 1)
            compiled = program.lower(of((rows, INPUTS), jnp.bfloat16), weight).compile()
        calls = re.findall(r'custom_call_target="(\w+)"', compiled.as_text())
        found[f"{name}, {bits} bits, {rows} rows"] = [compiled.memory_analysis().temp_size_in_bytes, calls]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

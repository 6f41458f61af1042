"""Compiles the TPU kernels for one kind of TPU that this machine need not have; prints JSON: temporaries by name.

    python compile_tpu_kernels.py v5e

The sizes are those of the family's models. That the whole programs copy nothing is another test's.
"""

from __future__ import annotations

# isort: off
from compile_target import topology  # before jax: it sets what jax reads when it is imported

# isort: on
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.kernels.attention import tpu as attention_tpu
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.linear import tpu as linear_tpu
from phi3_jax.kernels.linear.quantized import QuantizedTensor

L = 2
MINI, MEDIUM = (32, 32, 96), (40, 10, 128)  # N, K, H
ATTENTION: dict[str, tuple[Any, ...]] = {  # B, T, (N, K, H), S, dtype of the cache, window
    "decode": (64, 1, MINI, 1152, "bfloat16", None),
    "decode, int8": (8, 1, MEDIUM, 1152, "int8", 2047),
    "guesses": (1, 9, MINI, 1160, "bfloat16", None),
    "prefill": (1, 4096, MINI, 4096, "bfloat16", 2047),
    "chunk of 128k": (1, 512, MINI, 2**17, "bfloat16", None),
    "chunk of a ring, int8": (1, 512, MEDIUM, 2558, "int8", 2047),
}
LINEAR = {  # rows, O, I, bits, group, whether there are mins
    "int8": (1, 16384, 3072, 8, 32, False),
    "int4": (8, 3072, 8192, 4, 128, True),
    "int4, prefill": (4096, 16384, 3072, 4, 32, False),
    "int8, long rows": (64, 5120, 17920, 8, 64, True),
    "head": (1, 32064, 3072, 8, 32, False),
}


def main(target: str) -> None:
    """Prints one line of JSON."""
    mesh = Mesh(np.asarray(topology(target).devices), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def temporaries(function: Any, *arguments: Any) -> int:
        compiled: Any = jax.jit(function).lower(*arguments).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    layer, found = array((), jnp.int32), {}
    for name, (B, T, (N, K, H), S, dtype, window) in ATTENTION.items():
        cache, scale = array((L, B, K, S, 128), dtype), array((L, B, K, S), jnp.float32)
        scales = (scale, scale) if dtype == "int8" else (None, None)
        visible = Visibility(array((B, T), jnp.int32), array((B, S), jnp.int32), window=window)
        kv = KeysValues(cache, cache, *scales, layer)
        found[name] = temporaries(attention_tpu.attention, array((B, T, N, H), jnp.bfloat16), kv, visible)
    for name, (rows, outputs, inputs, bits, group, has_mins) in LINEAR.items():
        values = array((L, outputs, inputs * bits // 8), jnp.uint8)
        scales = array((L, outputs, inputs // group), jnp.float16)
        weight = QuantizedTensor(values, scales, scales if has_mins else None, bits, inputs)
        columns = jax.tree.map(lambda x: array(x.shape, x.dtype), jax.eval_shape(QuantizedTensor.by_columns, weight))
        found[name] = temporaries(linear_tpu.linear, array((rows, inputs), jnp.bfloat16), columns, layer)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

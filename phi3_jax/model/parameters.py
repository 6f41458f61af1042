"""The parameter tree: its shapes, its names in Hugging Face's checkpoints, and random parameters.

The names are derived from the model itself. A path in the tree is a Hugging Face name without the layer's number:
`layers/mlp/down_proj/weight` [L, D, F] holds `model.layers.{0..L-1}.mlp.down_proj.weight`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.model.decoder import Phi3

Params = dict[str, Any]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def dtype_name(dtype: jax.typing.DTypeLike) -> str:
    """The name, of those in DTYPES, of a dtype given as a name, a scalar type (jnp.bfloat16) or a numpy dtype.

    Raises ValueError if it is another one.
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
    return name


def parameter_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameter tree by path ("layers/mlp/down_proj/weight"); those below "layers/" start with L."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=8)  # a trace of the whole model, and a load asks several times
def _shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Rotary angles have no parameters: of a large head, which may be a damaged number, they are not built.
    share = min(config.partial_rotary_factor, 2 / config.head_dim)
    config = dataclasses.replace(config, partial_rotary_factor=share, long_rope=None)
    tree = jax.eval_shape(lambda tokens: Phi3(config).init(jax.random.key(0), tokens), tokens)["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def parameter_count(config: Phi3Config) -> int:
    """How many numbers the parameter tree has, by arithmetic alone, so that the sizes may be damaged ones."""
    D, H, K, N = config.hidden_size, config.head_dim, config.num_key_value_heads, config.num_attention_heads
    layer = D * H * (2 * N + 2 * K) + 3 * D * config.intermediate_size + 2 * D
    return config.num_hidden_layers * layer + (2 - config.tie_word_embeddings) * config.vocab_size * D + D


def tensor_names(path: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors in one leaf: one, or one for each layer."""
    dotted = path.replace("/", ".")
    if path.startswith("layers/"):
        return [f"model.layers.{i}.{dotted.removeprefix('layers.')}" for i in range(layers)]
    return [dotted if path.startswith("lm_head/") else f"model.{dotted}"]


def random_params(config: Phi3Config, dtype: jax.typing.DTypeLike = "float32", seed: int = 0) -> Params:
    """Random parameters of a dtype named in DTYPES: normal with `initializer_range`; the weights of norms are 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Params:
        params = Phi3(config).init(key, tokens)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype_name(dtype)), params)

    return jax.jit(init)(jax.random.key(seed))


def require_floats(leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if a leaf (by path) is no array of floats but a quantised or packed weight."""
    if wrong := [path for path, leaf in leaves.items() if not isinstance(leaf, jax.Array | np.ndarray)]:
        raise ValueError(
            f"{wrong[0]} is a {type(leaves[wrong[0]]).__name__} already: load the model as floats, with layout='rows'"
        )

"""Adapters for tests, and the slow obvious way to compute with them."""

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax.adapters import Adapter, LoraConfig, adapter_shapes

RECORDED = Path(__file__).parents[1] / "goldens_training"
BASE = Path(__file__).parents[1] / "goldens" / "gqa"


def random_adapter(config: phi3_jax.Phi3Config, lora: LoraConfig, seed: int = 0) -> Adapter:
    """An adapter that is far from zero."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: jnp.asarray(rng.uniform(0.5, 2, shape) if path.endswith("magnitude") else rng.normal(0, 0.3, shape))
        for path, shape in adapter_shapes(config, lora).items()
    }
    return flax.traverse_util.unflatten_dict({k: v.astype(jnp.float32) for k, v in leaves.items()}, sep="/")


def dense(params: Any, adapter: Adapter, lora: LoraConfig, scaling: float) -> Any:
    """Parameters with the adapter multiplied out, differentiable, for whole stacks at a time."""
    weights = flax.traverse_util.flatten_dict(params, sep="/")
    parts = flax.traverse_util.flatten_dict(adapter, sep="/")
    for path in [path for path in parts if path.endswith("/a")]:
        place = path.removesuffix("/a")
        sums = weights[f"{place}/weight"] + scaling * jnp.einsum("lor,lri->loi", parts[f"{place}/b"], parts[path])
        if lora.dora:
            norms = jax.lax.stop_gradient(jnp.sqrt((sums**2).sum(-1)))
            sums = sums * (parts[f"{place}/magnitude"] / norms)[..., None]
        weights[f"{place}/weight"] = sums
    return flax.traverse_util.unflatten_dict(weights, sep="/")

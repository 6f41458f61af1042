"""Between a checkpoint's named tensors and the parameter tree: the names, the stacking over layers, the copying.

The name table is derived from the model itself. A path in the tree is a Hugging Face name with the layer's number taken
out: `layers/mlp/down_proj/weight` [L, D, F] holds `model.layers.{0..L-1}.mlp.down_proj.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.model import Phi3

Params = dict[str, Any]
OnProgress = Callable[[int, int], None]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Copying runs at memory speed from two threads on; more only take cores from one another.
_THREADS = 4
_ALIGNMENT = 64  # bytes; a buffer aligned to this becomes a JAX array on the CPU without another copy


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """One named tensor of a checkpoint, not yet read.

    Attributes:
      shape: as Hugging Face has it: [out, in] or [D].
      dtype: name of the dtype that `read` gives.
      read: reads the tensor (dequantising, fusing, permuting as its format needs); nothing is kept between calls.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def parameter_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameter tree by path ("layers/mlp/down_proj/weight"); those below "layers/" start with L."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(lambda tokens: Phi3(config).init(jax.random.key(0), tokens), tokens)["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def tensor_names(path: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors in one leaf: one, or one for each layer."""
    dotted = path.replace("/", ".")
    if path.startswith("layers/"):
        return [f"model.layers.{i}.{dotted.removeprefix('layers.')}" for i in range(layers)]
    return [dotted if path.startswith("lm_head/") else f"model.{dotted}"]


def assemble(
    sources: Mapping[str, TensorSource],
    config: Phi3Config,
    dtype: str,
    origin: str,
    on_progress: OnProgress | None = None,
) -> Params:
    """Reads every tensor into the stacked parameter tree; the host never holds more than the model plus some tensors.

    Args:
      sources: the checkpoint's tensors by Hugging Face name.
      dtype: "float32", "bfloat16" or "float16": what the parameters become.
      origin: file or folder, for messages.
      on_progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
      ValueError: the dtype is unknown; tensors are missing, unknown or misshapen (all of them in one message); a value
        does not fit into float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
    shapes = parameter_shapes(config)
    _check_names(sources, shapes, config, origin)
    leaves = {path: _aligned_empty(shape, DTYPES[dtype]) for path, shape in shapes.items()}
    jobs = [
        (name, leaves[path][i] if path.startswith("layers/") else leaves[path])
        for path in shapes
        for i, name in enumerate(tensor_names(path, config.num_hidden_layers))
    ]
    total, done = sum(slot.nbytes for _, slot in jobs), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for size in pool.map(lambda job: _fill(job[1], sources[job[0]], job[0], origin), jobs):
            done += size
            if on_progress:
                on_progress(done, total)
    # One leaf after another leaves the host, so that on an accelerator the peak is not twice the model.
    on_device = {path: jax.block_until_ready(jax.device_put(leaves.pop(path))) for path in list(leaves)}
    return flax.traverse_util.unflatten_dict(on_device, sep="/")


def named_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The parameter tree as Hugging Face's tensors, in the order of the model."""
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        host = np.asarray(leaf)
        stack = host if path.startswith("layers/") else host[None]
        yield from zip(tensor_names(path, len(stack)), stack, strict=True)


def random_params(config: Phi3Config, dtype: str = "float32", seed: int = 0) -> Params:
    """Freshly initialised parameters: normal with `initializer_range`, norms at 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Params:
        params = Phi3(config).init(key, tokens)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)

    return jax.jit(init)(jax.random.key(seed))


def _check_names(
    sources: Mapping[str, TensorSource], shapes: Mapping[str, tuple[int, ...]], config: Phi3Config, origin: str
) -> None:
    layers = config.num_hidden_layers
    if layers > len(sources):  # before a list of names is made that a damaged config.json can make as long as it likes
        raise ValueError(f"{origin}: {len(sources)} tensors cannot be the weights of num_hidden_layers={layers}")
    expected = {
        name: shape[1:] if path.startswith("layers/") else shape
        for path, shape in shapes.items()
        for name in tensor_names(path, layers)
    }
    problems = []
    if missing := sorted(expected.keys() - sources.keys()):
        problems.append(f"missing tensors: {_some(missing)}")
    if unknown := sorted(sources.keys() - expected.keys()):
        problems.append(f"unknown tensors: {_some(unknown)}")
    misshapen = [
        f"{name} is {list(sources[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in sources and tuple(sources[name].shape) != shape
    ]
    if misshapen:
        problems.append(f"wrong shapes: {_some(misshapen)}")
    if problems:
        raise ValueError(f"{origin}: the weights do not fit the configuration; {'; '.join(problems)}")


def _some(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _fill(slot: np.ndarray, source: TensorSource, name: str, origin: str) -> int:
    """Casts one tensor into its place; returns the number of bytes written."""
    tensor = source.read()
    if tensor.shape != slot.shape:
        raise ValueError(f"{origin}: {name} was announced as {list(slot.shape)} but read as {list(tensor.shape)}")
    if tensor.dtype == slot.dtype:
        # As raw integers: numpy copies those at memory speed, but extension dtypes element by element.
        raw = np.dtype(f"u{slot.dtype.itemsize}")
        np.copyto(slot.view(raw), tensor.view(raw))
        return slot.nbytes
    with np.errstate(over="ignore"):
        np.copyto(slot, tensor, casting="unsafe")
    if slot.dtype == np.float16 and not np.isfinite(slot).all() and np.isfinite(tensor.astype(np.float32)).all():
        raise ValueError(f"{origin}: {name} has values beyond float16's largest, 65504: load it as bfloat16 or float32")
    return slot.nbytes

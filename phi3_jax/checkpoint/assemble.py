"""A checkpoint's named tensors -> the parameter tree, stacked over layers; and the tree's tensors by name."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint.parameter_builders import (
    FloatBuilder,
    IntegerBuilder,
    LayersBuilder,
    PackedFloatBuilder,
    ParameterBuilder,
)
from phi3_jax.checkpoint.placement import TABLE, Device, Layout, Put, compute_dtype, put_function
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import SIZES, Phi3Config
from phi3_jax.kernels import PackedTensor, PerLayer
from phi3_jax.model import DTYPES, Params, dtype_name, parameter_count, parameter_shapes, require_floats, tensor_names
from phi3_jax.progress import OnProgress
from phi3_jax.quantization import Format, formats

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Two threads are enough to copy at memory speed; many more would only compete for the cores.
_THREADS = 4
_LAYERS_AT_ONCE = 2  # one is read while the other is on its way to the device


def without_redundant(
    sources: Mapping[str, TensorSource], config: Phi3Config, origin: str
) -> tuple[dict[str, TensorSource], Phi3Config]:
    """The tensors, each stored once, and the configuration that fits them, as in transformers 5.

    A tied head that is stored, too, is left out if it equals the embedding. If it differs, a warning says that the two
    are not tied; if only the head is stored, it is the embedding.
    """
    found = dict(sources)
    if not config.tie_word_embeddings or _HEAD not in found:
        return found, config
    head = found.pop(_HEAD)
    table = found.setdefault(_TABLE, head)
    if table is head or (table.shape == head.shape and _are_equal(table.read(), head.read())):
        return found, config
    warnings.warn(
        f"{origin}: config.json ties {_HEAD} to {_TABLE}, but both are stored and differ: they are not tied",
        stacklevel=3,
    )
    return found | {_HEAD: head}, dataclasses.replace(config, tie_word_embeddings=False)


def assemble(
    sources: Mapping[str, TensorSource],
    config: Phi3Config,
    dtype: jax.typing.DTypeLike,
    origin: str,
    on_progress: OnProgress | None = None,
    quantize: str | None = None,
    layout: Layout = "rows",
    device: Device = None,
) -> Params:
    """Reads every tensor into the parameter tree.

    One parameter after another leaves the host: on an accelerator it holds no more than one of them (a stack, or two
    layers of one with "layers"), on the CPU the model, and beside it what the reading of some tensors takes.

    Args:
      sources: the checkpoint's tensors by Hugging Face name.
      dtype: float32, bfloat16 or float16, as a name or a type: the dtype of parameters that stay floats.
      origin: file or folder, for messages.
      on_progress: called with (bytes done, bytes in all) after each tensor.
      quantize: a policy of quantization/policy.py, by which matrices become integers; "stored" keeps integers of the
        types Q8_0, Q4_0, Q4_1 and Q4_K, leaves 16-bit floats as floats, and rounds the rest to 8 bits; None makes
        floats.
      layout: "packed" puts matrices of bfloat16 or integers into the order in which the CPU kernels read them; "rows"
        is Hugging Face's order; "layers" is, too, with a buffer for each layer; "columns" is "rows" for floats, and
        what the TPU kernel reads for integers (`QuantizedTensor`).
      device: where the parameters are put, see placement.py.

    Raises:
      ValueError: the dtype or the policy is unknown; tensors are missing, unknown or misshapen (all of them in one
        message); a value does not fit into float16; `device` does not fit an array.
      Unavailable: packed weights are asked for where there are no kernels.
    """
    floats = DTYPES[dtype_name(dtype)]
    require_room(config, sum(math.prod(source.shape) for source in sources.values()), origin)
    shapes = parameter_shapes(config)
    _check_names(sources, shapes, config, origin)
    forms = _formats(sources, shapes, config, quantize)
    L = config.num_hidden_layers

    def size(path: str, name: str) -> int:
        form = forms[path]
        return math.prod(sources[name].shape) * (form.bits if form else 8 * floats.itemsize) // 8

    def put(builder: ParameterBuilder, path: str, numbered: tuple[int, str]) -> int:
        layer, name = numbered
        try:
            builder.put(layer if path.startswith("layers/") else None, sources[name])
        except ValueError as error:
            raise ValueError(f"{origin}: {name}: {error}") from None
        return size(path, name)

    total, done = sum(size(path, name) for path in shapes for name in tensor_names(path, L)), 0
    # Rounding has threads of its own.
    threads = 1 if quantize is not None else _LAYERS_AT_ONCE if layout == "layers" else _THREADS
    leaves: dict[str, Any] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path, shape in shapes.items():
            builder = builder_of(path, shape, floats, forms[path], layout, device)
            for count in pool.map(functools.partial(put, builder, path), enumerate(tensor_names(path, L))):
                done += count
                if on_progress:
                    on_progress(done, total)
            leaves[path] = jax.block_until_ready(builder.finish())
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _formats(
    sources: Mapping[str, TensorSource], shapes: Mapping[str, tuple[int, ...]], config: Phi3Config, quantize: str | None
) -> dict[str, Format | None]:
    """The format of each leaf; None where it stays floats."""
    if quantize is None:
        return dict.fromkeys(shapes)
    if quantize != "stored":
        return formats(quantize, shapes)
    if all(source.form is None for source in sources.values()):
        raise ValueError("there are no integers in the file to be kept: name another quantisation than 'stored'")
    found: dict[str, Format | None] = {}
    for path in shapes:
        ours = [sources[name] for name in tensor_names(path, config.num_hidden_layers)]
        bits = {source.form.bits if source.form else None for source in ours}
        has_mins = any(source.form.has_mins for source in ours if source.form)
        if len(ours[0].shape) < 2 or all(source.dtype in ("float16", "bfloat16") for source in ours):
            found[path] = None
        elif bits in ({4}, {8}):
            found[path] = Format(4 if bits == {4} else 8, symmetric=not has_mins)
        else:  # layers that differ, or integers of types that are not kept
            found[path] = Format(8)
    return found


def builder_of(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    form: Format | None,
    layout: Layout,
    device: Device = None,
) -> ParameterBuilder:
    """What builds the parameter at a path: integers of a format, or with None floats of this dtype.

    Args:
      layout: see `assemble`.
      device: where its arrays are put, see placement.py; it is asked for the shapes of a layer with "layers".
    """
    put, is_stack = put_function(device, path), path.startswith("layers/")
    by_column = layout == "columns" and path != TABLE
    if layout == "layers" and is_stack:
        return LayersBuilder(shape[0], lambda: _builder(shape[1:], dtype, form, put, device))
    if layout == "packed" and form is not None:
        return IntegerBuilder(shape, form, True, put)
    if layout == "packed" and dtype == DTYPES["bfloat16"]:
        is_matrix = len(shape) - is_stack == 2
        return PackedFloatBuilder(shape, put) if is_matrix else FloatBuilder(shape, DTYPES["float32"], put)
    return _builder(shape, dtype, form, put, device, by_column)


def _builder(
    shape: tuple[int, ...], dtype: np.dtype, form: Format | None, put: Put, device: Device, by_column: bool = False
) -> ParameterBuilder:
    if form is None:
        return FloatBuilder(shape, dtype, put)
    return IntegerBuilder(shape, form, False, put, compute_dtype(dtype.name, device), by_column)


def named_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The parameter tree as Hugging Face's tensors, in the order of the model. Packed floats are unpacked.

    Raises ValueError if weights are integers.
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    is_packed = {path: isinstance(leaf, PackedTensor) and leaf.scales is None for path, leaf in leaves.items()}
    one_layer = {path: leaf[0] if isinstance(leaf, PerLayer) else leaf for path, leaf in leaves.items()}
    require_floats({path: leaf for path, leaf in one_layer.items() if not is_packed[path]})
    for path, leaf in leaves.items():
        layers = leaf.shape[0] if path.startswith("layers/") else 1
        stack: Iterator[np.ndarray]
        if is_packed[path]:
            stack = (np.asarray(leaf.dequantize(jnp.int32(i)).astype(jnp.bfloat16)) for i in range(layers))
        elif isinstance(leaf, PerLayer):
            stack = map(np.asarray, leaf)
        else:
            host = np.asarray(leaf)
            # Packed matrices come with vectors of float32, which were bfloat16 like the matrices, if nothing is lost.
            host = _as_bfloat16(host) if any(is_packed.values()) else host
            stack = iter(host if path.startswith("layers/") else host[None])
        yield from zip(tensor_names(path, layers), stack, strict=True)


def _are_equal(left: np.ndarray, right: np.ndarray) -> bool:
    if np.array_equal(left, right):
        return True
    # A damaged number is not equal to itself, but its bits are.
    bits = [np.ascontiguousarray(array).view(np.uint8) for array in (left, right)]
    return left.dtype == right.dtype and np.array_equal(bits[0], bits[1])


def _as_bfloat16(vectors: np.ndarray) -> np.ndarray:
    rounded = vectors.astype(DTYPES["bfloat16"])
    return rounded if np.array_equal(rounded.astype(vectors.dtype), vectors) else vectors


def _check_names(
    sources: Mapping[str, TensorSource], shapes: Mapping[str, tuple[int, ...]], config: Phi3Config, origin: str
) -> None:
    layers = config.num_hidden_layers
    if layers > len(sources):  # the list of names could be huge
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


def require_room(config: Phi3Config, numbers: int, origin: str) -> None:
    """Raises ValueError if a model of these sizes has very many more numbers than the files can hold.

    It comes first: with one damaged size, such as vocab_size=8000000000, whatever is built next fills the memory.

    Args:
      numbers: at most so many numbers are in the files.
    """
    if parameter_count(config) > 16 * numbers:
        given = ", ".join(f"{name}={getattr(config, name)}" for name in SIZES)
        raise ValueError(
            f"{origin}: the weights do not fit the configuration; its sizes ({given}) make {parameter_count(config)} "
            f"parameters, and there is room for {numbers} in the files: download both again"
        )


def _some(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

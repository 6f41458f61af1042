"""A model without a prompt: a table of its parameters, what they are kept as, and what that has cost in accuracy.

One matrix at a time becomes floats, of a table of embeddings some thousand rows: no second copy of the model is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import Phi3Config, inspection
from phi3_jax.checkpoint import kind_of_weights
from phi3_jax.checkpoint.as_floats import matrix
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.kernels import LoraTensor, PackedTensor, PerLayer, QuantizedTensor
from phi3_jax.model import parameter_shapes, tensor_names
from phi3_jax.progress import OnProgress
from phi3_jax.quantization import Format, quantized_shapes

from .rounding import rounded
from .sizes import cache_bytes, model_section, token_work

FORMAT, VERSION = "phi3-weights", 1
_TABLE = "embed_tokens/weight"
_ROWS = 8192  # of a table that become floats at a time
UNKNOWN = "unknown: the file holds integers, and the floats that they were made from are not there"


def weigh(
    config: Phi3Config,
    params: Any,
    *,
    name: str,
    context: int,
    cache_dtype: Any,
    floats: Mapping[str, TensorSource] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The table of a model's parameters (SCHEMA.md).

    Args:
      params: of any kind.
      name: of the model, for titles.
      context: how many tokens lie behind the one whose work is counted.
      cache_dtype: what keys and values are kept as.
      floats: the tensors that integers were made from, with which they are compared, by `model.tensor_names`.
      on_progress: called with (parameters done, parameters in all).
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    total, done, found = sum(_count(leaf) for leaf in leaves.values()), 0, []
    for path, leaf in leaves.items():
        sources = None if floats is None or not _is_integers(leaf) else _sources(floats, path, config)
        found.append(_row(path, leaf) | _measured(path, leaf, sources))
        done += _count(leaf)
        if on_progress:
            on_progress(done, total)
    integers = any(map(_is_integers, leaves.values()))
    errors = ("relative to the file's weights" if floats is not None else UNKNOWN) if integers else None
    return _table(config, found, name, kind(params), context, cache_dtype, errors)


def weigh_shapes(
    config: Phi3Config, *, name: str, context: int, cache_dtype: Any, dtype: str, quantize: str | None = None
) -> dict[str, Any]:
    """The same of a model of which only the sizes are known, in floats of `dtype`, or by a policy in integers.

    Raises ValueError for a policy that there is not.
    """
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in parameter_shapes(config).items()}
    leaves: Mapping[str, Any] = shapes if quantize is None else quantized_shapes(quantize, shapes)
    nothing = {"norm": None, "norms": None, "largest": None, "error": None, "errors": None}
    found = [_row(path, leaf) | nothing for path, leaf in leaves.items()]
    return _table(config, found, name, quantize or dtype, context, cache_dtype, None)


def kind(params: Any) -> str:
    """What the weights are kept as: "float32", "int4", "int8 with an adapter", ..."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/").values()
    integers, one = kind_of_weights(params), params["embed_tokens"]["weight"]
    packed = [leaf.kind for leaf in leaves if isinstance(leaf, PackedTensor)]
    name = integers or (packed[0] if packed else str(one.dtype))
    attached = any(isinstance(_layer(leaf, 0), LoraTensor) for leaf in leaves)
    return f"{name} with an adapter" if attached else name


def _table(
    config: Phi3Config,
    found: list[dict[str, Any]],
    name: str,
    weights: str,
    context: int,
    cache_dtype: Any,
    errors: str | None,
) -> dict[str, Any]:
    bytes_ = sum(row["bytes"] for row in found)
    # A tied head has a row of its own where an adapter has parted it from the embedding.
    has_head = any(row["name"].startswith("lm_head/") for row in found)
    apart = next(row["bytes"] for row in found if row["name"] == _TABLE) if has_head else 0
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model_section(config, name, weights),
        "parameters": found,
        "total": {"count": sum(row["count"] for row in found), "bytes": bytes_},
        "errors": errors,
        "token": token_work(config, context, bytes_ - apart, cache_dtype),
        "cache": {"dtype": str(jnp.dtype(cache_dtype)), "bytes_per_token": cache_bytes(config, cache_dtype)},
    }


def _sources(floats: Mapping[str, TensorSource], path: str, config: Phi3Config) -> list[TensorSource]:
    """The tensors that a parameter was made from; of a tied head that an adapter has parted, the embedding's."""
    names = tensor_names(path, config.num_hidden_layers)
    if names[0] not in floats and config.tie_word_embeddings:
        names = tensor_names(_TABLE, 1)
    return [floats[each] for each in names]


def _row(path: str, leaf: Any) -> dict[str, Any]:
    return {
        "name": path,
        "shape": list(leaf.shape),
        "count": _count(leaf),
        "dtype": _dtype(leaf),
        "bytes": _bytes(leaf),
    }


def _measured(path: str, leaf: Any, sources: list[TensorSource] | None) -> dict[str, Any]:
    """Norms (Frobenius) of a parameter and of its layers, its largest number, and errors relative to the norm."""
    squares, wrong, originals, largest = [], [], [], 0.0
    for layer in range(leaf.shape[0]) if path.startswith("layers/") else (None,):
        source = None if sources is None else sources[layer or 0].read()
        square = error = original = 0.0
        for start, block, plain in _blocks(leaf, layer, sources is not None):
            square += float(np.square(block, dtype=np.float64).sum())
            largest = max(largest, float(np.abs(block).max()))
            if source is not None:
                floats = np.asarray(source[start : start + len(block)], np.float32)
                error += float(np.square(plain - floats, dtype=np.float64).sum())
                original += float(np.square(floats, dtype=np.float64).sum())
        squares.append(square)
        wrong.append(error)
        originals.append(original)
    relative = sources is not None and sum(originals) > 0
    return {
        "norm": rounded(np.sqrt(sum(squares))),
        "norms": rounded(np.sqrt(squares)),
        "largest": rounded(largest),
        "error": rounded(np.sqrt(sum(wrong) / sum(originals))) if relative else None,
        "errors": [rounded(np.sqrt(a / b)) if b else None for a, b in zip(wrong, originals, strict=True)]
        if relative
        else None,
    }


def _blocks(leaf: Any, layer: int | None, compared: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, rows as float32, the same without an adapter) of one layer's weight, or of the only one."""
    if layer is None and len(leaf.shape) == 2:
        for start in range(0, leaf.shape[0], _ROWS):
            ids = jnp.arange(start, min(start + _ROWS, leaf.shape[0]))
            block = _table_rows(leaf, ids)
            yield start, block, _table_rows(_base(leaf), ids) if compared else block
        return
    one = _layer(leaf, layer)
    place = None if isinstance(leaf, PerLayer) else layer
    block = matrix(one, place)
    yield 0, block, matrix(_base(one), place) if compared and isinstance(one, LoraTensor) else block


def _table_rows(leaf: Any, ids: jax.Array) -> np.ndarray:
    return np.asarray(inspection.token_rows({"embed_tokens": {"weight": leaf}}, ids))


def _layer(leaf: Any, number: int | None) -> Any:
    return leaf[number] if isinstance(leaf, PerLayer) else leaf


def _base(leaf: Any) -> Any:
    """A weight without the adapter that is attached to it."""
    return leaf.base if isinstance(leaf, LoraTensor) else leaf


def _is_integers(leaf: Any) -> bool:
    base = _base(_layer(leaf, 0))
    return isinstance(base, QuantizedTensor) or (isinstance(base, PackedTensor) and base.scales is not None)


def _dtype(leaf: Any) -> str:
    """What a weight is kept as: "float32", "int4-g32", "bfloat16", "int8-g32 with rank 8"."""
    one = _layer(leaf, 0)
    base = _base(one)
    if isinstance(base, QuantizedTensor):
        name = str(Format(base.bits, base.group, base.mins is None))
    elif isinstance(base, PackedTensor):
        integers = base.scales is not None
        name = str(Format(int(base.kind[3:]), base.group, base.mins is None)) if integers else base.kind
    else:
        name = str(base.dtype)
    return f"{name} with rank {one.a.shape[-2]}" if isinstance(one, LoraTensor) else name


def _count(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))


def _bytes(leaf: Any) -> int:
    """Of all arrays of a weight, an adapter's included."""
    if isinstance(leaf, PerLayer):
        return sum(map(_bytes, leaf.layers))
    if isinstance(leaf, LoraTensor):
        return _bytes(leaf.base) + sum(each.nbytes for each in (leaf.a, leaf.b, leaf.gain) if each is not None)
    if isinstance(leaf, QuantizedTensor) and leaf.by_column:
        return leaf.nbytes  # four bits are counted as such
    return sum(int(np.prod(each.shape)) * each.dtype.itemsize for each in jax.tree.leaves(leaf))

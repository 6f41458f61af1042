"""Files of quantised or packed weights: the leaves of the parameter tree as they are, in one safetensors file.

The file is memory-mapped: the operating system reads its parts when they are first used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np

from phi3_jax.checkpoint import safetensors_files
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import PackedTensor, QuantizedTensor
from phi3_jax.kernels.linear.packed import Packing, arrays_of
from phi3_jax.kernels.linear.quantized import GROUPS
from phi3_jax.model import Params, parameter_shapes

FILE = "phi3_jax.safetensors"
METHOD = "phi3_jax"  # the quant_method of config.json's quantization_config
_KINDS = safetensors_files.FLOATS | {"U8": np.dtype(np.uint8)}
_ALIGNMENT = 64  # bytes: where a mapped array begins, so that JAX takes it as it is


def is_quantized(params: Params) -> bool:
    """Whether some weights are integers or packed, also where an adapter is attached to them."""

    def is_one(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor | PackedTensor)

    return any(map(is_one, jax.tree.leaves(params, is_leaf=is_one)))


def describe(params: Params) -> dict[str, Any]:
    """What config.json says about the file, under "quantization_config"."""
    leaves = {path: _entry(leaf) for path, leaf in _flat(params).items()}
    return {"quant_method": METHOD, "leaves": leaves}


def write(folder: Path, params: Params) -> None:
    """Writes the file. Arrays whose sizes are multiples of 64 bytes (all large ones) come first and so are aligned."""
    arrays = dict(_arrays(params))
    names = sorted(arrays, key=lambda name: (arrays[name].nbytes % _ALIGNMENT != 0, name))
    kinds = {dtype: kind for kind, dtype in _KINDS.items()}
    header, end = {}, 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kinds[np.dtype(array.dtype)], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with (folder / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            np.asarray(arrays[name]).view(np.uint8).tofile(file)


def read(folder: Path, described: Any, config: Phi3Config, packed: bool) -> Params:
    """Maps what `write` wrote.

    Args:
      described: what `describe` said.
      packed: put integers that are not packed yet into the order in which the CPU kernels read them.

    Raises:
      FileNotFoundError: the file is missing.
      Unavailable: `packed` is asked for where there are no kernels.
      ValueError: it is damaged, or it does not fit the description or the configuration.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; write the checkpoint again with phi3-quantize")
    shapes, entries = parameter_shapes(config), described.get("leaves") if isinstance(described, dict) else None
    if not isinstance(entries, dict) or entries.keys() != shapes.keys():
        raise ValueError(f"{folder}/config.json: quantization_config does not describe the weights of this model")
    sources = safetensors_files.read_file(path, _KINDS)
    leaves = {}
    for name, shape in shapes.items():
        wanted = _wanted(name, entries[name], shape, folder)
        for array, (size, dtype) in wanted.items():
            source = sources.get(f"{name}.{array}")
            if source is None or (source.shape, source.dtype) != (size, dtype.name):
                raise ValueError(f"{path}: {name}.{array} is not {dtype} {list(size)}; write the checkpoint again")
        mapped = {array: sources[f"{name}.{array}"].read() for array in wanted}
        leaves[name] = _leaf(entries[name], shape, mapped, packed)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _flat(params: Params) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _entry(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, QuantizedTensor):
        return {"kind": f"int{leaf.bits}", "group": leaf.group, "symmetric": leaf.mins is None, "packed": False}
    if isinstance(leaf, PackedTensor):
        group = 32 if leaf.scales is None else leaf.group
        return {"kind": leaf.kind, "group": group, "symmetric": leaf.mins is None, "packed": True}
    return {"kind": str(leaf.dtype), "packed": False}


def _arrays(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in _flat(params).items():
        names = ("values", "data", "scales", "mins")
        found = {name: getattr(leaf, name) for name in names if getattr(leaf, name, None) is not None}
        for name, array in (found or {"floats": leaf}).items():
            yield f"{path}.{name}", np.asarray(array)


def _wanted(
    name: str, entry: Mapping[str, Any], shape: tuple[int, ...], folder: Path
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the arrays of a leaf with this description."""
    kind: Any = entry.get("kind")
    group, symmetric = entry.get("group", 32), entry.get("symmetric", True)
    floats = {
        "float32": np.dtype(np.float32),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype(np.float16),
    }
    packed, integers = entry.get("packed"), kind in ("int8", "int4")
    if group not in GROUPS or (packed and kind not in ("bfloat16", "int8", "int4")) or not (integers or kind in floats):
        raise ValueError(f"{folder}/config.json: quantization_config describes {name} as {entry}, which is unknown")
    if packed:
        return arrays_of(shape, kind, group, symmetric)
    if not integers:
        return {"floats": (shape, floats[kind])}
    groups = -(-shape[-1] // group)
    values = ((*shape[:-1], groups * group * int(kind[3:]) // 8), np.dtype(np.uint8))
    scales = ((*shape[:-1], groups), np.dtype(np.float16))
    return {"values": values, "scales": scales} | ({} if symmetric else {"mins": scales})


def _leaf(entry: Mapping[str, Any], shape: tuple[int, ...], mapped: dict[str, np.ndarray], packed: bool) -> Any:
    if "floats" in mapped:
        return jax.device_put(mapped["floats"])
    if "values" in mapped and packed:
        packing = Packing(shape, entry["kind"], entry["group"], entry["symmetric"])
        for layer in range(math.prod(shape[:-2])):
            one = {name: array if len(shape) == 2 else array[layer] for name, array in mapped.items()}
            packing.put_integers(layer, one["values"], one["scales"], one.get("mins"))
        return packing.finish()
    arrays = {name: jax.device_put(array) for name, array in mapped.items()}
    mins = arrays.get("mins")
    if "values" in arrays:
        return QuantizedTensor(arrays["values"], arrays["scales"], mins, int(entry["kind"][3:]), shape[-1])
    return PackedTensor(arrays["data"], arrays.get("scales"), mins, entry["kind"], shape)

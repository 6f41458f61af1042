"""Files of quantised or packed weights: the leaves of the parameter tree as they are, in one safetensors file.

The file is memory-mapped: it takes no memory of its own, and on the CPU the model goes on reading from it. It is read
through once when it is loaded, for its checksums. A program that then writes into the same file changes the running
model, and one that cuts it short ends the process (SIGBUS): replace such files by others (`save` does), never in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from phi3_jax.checkpoint import safetensors_files
from phi3_jax.checkpoint.assemble import require_room
from phi3_jax.checkpoint.placement import TABLE, Device, Layout, Put, put_function
from phi3_jax.config import Phi3Config
from phi3_jax.json_files import shown
from phi3_jax.kernels import PackedTensor, PerLayer, QuantizedTensor
from phi3_jax.kernels.linear.packed import BITS, Packing, arrays_of
from phi3_jax.kernels.linear.per_layer import stacked
from phi3_jax.kernels.linear.quantized import GROUPS
from phi3_jax.model import DTYPES, Params, parameter_shapes
from phi3_jax.regular_file import require_regular

FILE = "phi3_jax.safetensors"
METHOD = "phi3_jax"  # the quant_method of config.json's quantization_config
_KINDS = safetensors_files.FLOATS | {"U8": np.dtype(np.uint8)}


def is_quantized(params: Params) -> bool:
    """Whether some weights are integers or packed, also where an adapter is attached to them."""

    def is_one(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor | PackedTensor)

    return any(map(is_one, jax.tree.leaves(params, is_leaf=is_one)))


def has_integers(params: Params) -> bool:
    """Whether some weights are integers; packed floats are none."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor | PackedTensor))
    return any(isinstance(each, QuantizedTensor | PackedTensor) and each.scales is not None for each in leaves)


def describe(params: Params) -> dict[str, Any]:
    """What config.json says about the file, under "quantization_config"."""
    leaves = {path: _entry(leaf) | {"shape": list(leaf.shape)} for path, leaf in _flat(params).items()}
    return {"quant_method": METHOD, "leaves": leaves}


def write(folder: Path, params: Params) -> None:
    """Writes the file."""
    safetensors_files.write_file(folder / FILE, dict(_arrays(params)))


def require_dtype(params: Params, dtype: str, folder: Path) -> None:
    """Raises ValueError if the weights that are floats, packed ones included, are of another dtype."""
    kinds = {path: _entry(leaf)["kind"] for path, leaf in _flat(params).items()}
    floats = {path: kind for path, kind in kinds.items() if kind not in BITS}
    # Packed matrices of bfloat16 come with vectors of float32, which do not count.
    matrices = {kind for path, kind in floats.items() if not path.endswith("norm/weight")}
    if (matrices or set(floats.values())) != {dtype}:
        raise ValueError(
            f"{folder}: the weights are {', '.join(sorted(set(kinds.values())))}, and are taken as they are, not "
            f"converted to {dtype}: leave the dtype out, or load the checkpoint that they were made from"
        )


def read(
    folder: Path, described: Any, config: Phi3Config, layout: Layout, device: Device = None, compute: str = "float32"
) -> Params:
    """Maps what `write` wrote.

    Args:
      described: what `describe` said.
      layout: "packed" puts integers that are not packed yet into the order in which the CPU kernels read them; with
        "layers" each layer gets buffers of its own, except of weights that are packed; "columns" is for integers.
      device: where the arrays are put, see placement.py.
      compute: of the QuantizedTensors.

    Raises:
      FileNotFoundError: the file is missing.
      Unavailable: "packed" is asked for where there are no kernels.
      ValueError: it is damaged, or it does not fit the description or the configuration.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; write the checkpoint again with phi3-quantize")
    require_regular(path)
    before = _state(path)
    require_room(config, 2 * path.stat().st_size, str(folder))  # four bits are the least that a number takes
    shapes, entries = parameter_shapes(config), described.get("leaves") if isinstance(described, dict) else None
    if not isinstance(entries, dict) or entries.keys() != shapes.keys():
        raise ValueError(f"{folder}/config.json: quantization_config does not describe the weights of this model")
    sources = safetensors_files.read_file(path, _KINDS)
    forms = {name: _form(name, entries[name], shape, folder) for name, shape in shapes.items()}
    leaves = {}
    for name, shape in shapes.items():
        # Packed, 40 outputs take as much room as 48: the shapes of the arrays do not tell these sizes apart.
        if (said := entries[name].get("shape", list(shape))) != list(shape):
            raise ValueError(
                f"{folder}/config.json: the sizes make {name} {list(shape)}, and quantization_config says {shown(said)}"
            )
        wanted = _wanted(forms[name], shape)
        for array, (size, dtype) in wanted.items():
            source = sources.get(f"{name}.{array}")
            if source is None or (source.shape, source.dtype) != (size, dtype.name):
                raise ValueError(f"{path}: {name}.{array} is not {dtype} {list(size)}; write the checkpoint again")
        mapped = {array: sources[f"{name}.{array}"].read() for array in wanted}
        leaves[name] = _leaf(forms[name], name, shape, mapped, layout, put_function(device, name), compute)
    if _state(path) != before:
        raise ValueError(f"{path}: the file changed while it was loaded; load it again when it is complete")
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _state(path: Path) -> tuple[int, int, int]:
    """What is another after a file was written to, or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _flat(params: Params) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _entry(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, PerLayer):
        return _entry(leaf[0])
    if isinstance(leaf, QuantizedTensor):
        return {"kind": f"int{leaf.bits}", "group": leaf.group, "symmetric": leaf.mins is None, "packed": False}
    if isinstance(leaf, PackedTensor):
        group = 32 if leaf.scales is None else leaf.group
        return {"kind": leaf.kind, "group": group, "symmetric": leaf.mins is None, "packed": True}
    return {"kind": str(leaf.dtype), "packed": False}


def _arrays(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in _flat(params).items():
        leaf = stacked(jax.tree.map(np.asarray, leaf)) if isinstance(leaf, PerLayer) else leaf
        found = {"floats": leaf}
        if isinstance(leaf, QuantizedTensor | PackedTensor):
            leaf = jax.tree.map(np.asarray, leaf)
            leaf = leaf.by_rows() if isinstance(leaf, QuantizedTensor) else leaf
            names = ("values", "data", "scales", "mins")
            found = {name: getattr(leaf, name) for name in names if getattr(leaf, name, None) is not None}
        for name, array in found.items():
            yield f"{path}.{name}", np.asarray(array)


class _Form(NamedTuple):
    """The description of a leaf, checked: see `_entry`."""

    kind: Any
    group: int
    symmetric: bool
    packed: bool


def _form(name: str, entry: Any, shape: tuple[int, ...], folder: Path) -> _Form:
    """Reads what config.json says of a leaf. Raises ValueError for anything that `_entry` does not write."""
    found = _Form("", 32, True, False)
    if isinstance(entry, dict):
        found = _Form(*(entry.get(field, default) for field, default in zip(_Form._fields, found, strict=True)))
    is_matrix = len(shape) - name.startswith("layers/") == 2
    kinds = {"float32", "bfloat16", "float16", "int8", "int4"} if is_matrix else {"float32", "bfloat16", "float16"}
    if (
        [type(each) for each in found] != [str, int, bool, bool]
        or found.kind not in (kinds - {"float32", "float16"} if found.packed else kinds)
        or found.group not in GROUPS
        or (found.packed and not is_matrix)
    ):
        raise ValueError(
            f"{folder}/config.json: quantization_config describes {name} as {shown(entry)}, which is unknown"
        )
    return found


def _wanted(form: _Form, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the arrays of a leaf with this description."""
    if form.packed:
        return arrays_of(shape, form.kind, form.group, form.symmetric)
    if form.kind not in BITS:
        return {"floats": (shape, DTYPES[form.kind])}
    groups = -(-shape[-1] // form.group)
    scales = ((*shape[:-1], groups), np.dtype(np.float16))
    values = ((*shape[:-1], groups * form.group * BITS[form.kind] // 8), np.dtype(np.uint8))
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {"values": values, "scales": scales}
    return found if form.symmetric else found | {"mins": scales}


def _leaf(
    form: _Form,
    name: str,
    shape: tuple[int, ...],
    mapped: dict[str, np.ndarray],
    layout: Layout,
    put: Put,
    compute: str,
) -> Any:
    if "values" in mapped and layout == "packed":
        packing = Packing(shape, form.kind, form.group, form.symmetric)
        for layer in range(math.prod(shape[:-2])):
            one = {name: array if len(shape) == 2 else array[layer] for name, array in mapped.items()}
            packing.put_integers(layer, one["values"], one["scales"], one.get("mins"))
        return packing.finish(put)

    def weight(arrays: dict[str, np.ndarray]) -> Any:
        if "values" in arrays:
            values, scales, mins = (arrays.get(name) for name in ("values", "scales", "mins"))
            tensor: Any = QuantizedTensor(values, scales, mins, BITS[form.kind], shape[-1], compute)  # type: ignore[arg-type]
            by_column = layout == "columns" and name != TABLE
            return jax.tree.map(put, tensor.by_columns() if by_column else tensor)
        found = {name: put(array) for name, array in arrays.items()}
        if "floats" in found:
            return found["floats"]
        return PackedTensor(found["data"], found.get("scales"), found.get("mins"), form.kind, shape)

    if layout == "layers" and name.startswith("layers/") and not form.packed:
        layers = ({name: array[i] for name, array in mapped.items()} for i in range(shape[0]))
        return PerLayer(tuple(jax.block_until_ready(weight(each)) for each in layers))
    return weight(mapped)

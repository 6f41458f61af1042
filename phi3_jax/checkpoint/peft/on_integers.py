"""An adapter on top of weights that are integers, as it was trained there (QLoRA, arXiv:2305.14314).

Rounding the sum of weights and update would round most of the update away, and give other integers than those that the
adapter learned to correct. So the update stays beside the integers.

Axis letters: L layer, O outputs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from phi3_jax.adapters import Adapter, LoraConfig, attach
from phi3_jax.checkpoint.as_floats import matrix
from phi3_jax.checkpoint.assemble import builder_of
from phi3_jax.checkpoint.peft.attached import stacked
from phi3_jax.checkpoint.peft.merging import Change, base_changes, changes, unties
from phi3_jax.checkpoint.peft.modules import Module
from phi3_jax.checkpoint.peft.reader import AdapterFiles
from phi3_jax.checkpoint.peft.trained_on import kind_of_weights, warn_of_others
from phi3_jax.checkpoint.placement import Device, Layout, put_function
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import PerLayer
from phi3_jax.model import DTYPES, Params, dtype_name, parameter_shapes


def on_integers(
    params: Params,
    config: Phi3Config,
    files: AdapterFiles,
    dtype: jax.typing.DTypeLike,
    layout: Layout = "rows",
    device: Device = None,
) -> tuple[Params, Phi3Config]:
    """Parameters with an adapter, and the configuration that fits them.

    Its low-rank updates of a layer's matrices are attached, in float32. Nothing is compiled again for another adapter
    of the same rank and targets. A weight that the adapter changes otherwise (the embedding, the head, modules and rows
    that are stored in full, DoRA of some rows or layers only) becomes floats: the integers as floats, changed.

    Args:
      params: integers, packed or not, and floats.
      dtype: of weights that become floats.
      layout: theirs.
      device: where the new arrays are put; it is asked for "layers/mlp/down_proj/a" [L, R, I] and ".../b" [L, O, R],
        without L if the layout is "layers".

    Warns:
      UserWarning: the adapter unties the embedding and the head, or was trained on other weights.

    Raises:
      ValueError: the parameters are not those of the adapter's model, or a value does not fit into float16.
    """
    floats, leaves = DTYPES[dtype_name(dtype)], flax.traverse_util.flatten_dict(params, sep="/")
    attached = _attached_paths(files, config)
    warn_of_others(files.settings.path, kind_of_weights(params))

    def change(those: list[tuple[Module, Change]]) -> None:
        by_path: dict[str, dict[int, list[Change]]] = {}
        for module, each in those:
            path = f"{module.path}/weight"
            # A tied head is the embedding, until the two are untied.
            path = path if path in leaves else "embed_tokens/weight"
            by_path.setdefault(path, {}).setdefault(module.layer or 0, []).append(each)
        for path, of_layers in by_path.items():
            leaves[path] = _changed(path, leaves[path], of_layers, floats, layout, device, files)

    change(base_changes(files))
    if unties(files, config):
        leaves["lm_head/weight"] = leaves["embed_tokens/weight"]
        config = dataclasses.replace(config, tie_word_embeddings=False)
    change([(module, each) for module, each in changes(files) if module.path not in attached])
    params = flax.traverse_util.unflatten_dict(leaves, sep="/")
    updates = [update for update in files.updates if update.module.path in attached]
    if not updates:
        return params, config
    found = stacked(dataclasses.replace(files, base=[], whole=[], rows=[], updates=updates), config)
    return attach(params, _placed(found.adapter, found.lora, leaves, device), _as_arguments(found.lora)), config


def _attached_paths(files: AdapterFiles, config: Phi3Config) -> set[str]:
    """The matrices, "layers/mlp/down_proj", that can keep their integers."""
    shapes, rows = parameter_shapes(config), collections.Counter[str]()
    for update in files.updates:
        rows[update.module.path] += update.module.shape[0]
    others = {module.path for module, _ in files.base + files.whole} | {module.path for module, _, _ in files.rows}
    others |= {update.module.path for update in files.updates if update.module.kind != "linear"}
    if files.settings.lora.dora:  # what it leaves out would need magnitudes, too
        others |= {path for path, count in rows.items() if count != math.prod(shapes.get(f"{path}/weight", ())[:-1])}
    return rows.keys() - others


def _changed(
    path: str,
    leaf: Any,
    of_layers: Mapping[int, Sequence[Change]],
    dtype: np.dtype,
    layout: Layout,
    device: Device,
    files: AdapterFiles,
) -> Any:
    """A weight as floats, with the changes of its layers (0 if it is no stack), one layer after another."""
    is_stack = path.startswith("layers/")
    builder = builder_of(path, leaf.shape, dtype, None, layout, device)

    def read(layer: int) -> np.ndarray:
        weight = np.array(matrix(leaf, layer if is_stack else None))
        for each in of_layers.get(layer, ()):
            each(weight)
        return weight

    for layer in range(leaf.shape[0] if is_stack else 1):
        source = TensorSource(leaf.shape[1:] if is_stack else leaf.shape, "float32", functools.partial(read, layer))
        try:
            builder.put(layer if is_stack else None, source)
        except ValueError as error:
            raise ValueError(f"{files.weights}: {path}: {error}") from None
    return builder.finish()


def _placed(adapter: Adapter, lora: LoraConfig, weights: Mapping[str, Any], device: Device) -> Adapter:
    """The adapter where it belongs, its scaling a part of b, in a buffer per layer where the weights are."""
    placed = {}
    for path, leaf in flax.traverse_util.flatten_dict(adapter, sep="/").items():
        array, (place, _, part) = np.asarray(leaf), path.rpartition("/")
        target = place.split("/")[-1]
        whole = array * np.float32(lora.scaling_of(target)) if part == "b" else array
        put, is_split = put_function(device, path), isinstance(weights[f"{place}/weight"], PerLayer)
        placed[path] = PerLayer(tuple(map(put, whole))) if is_split else put(whole)
    return flax.traverse_util.unflatten_dict(placed, sep="/")


def _as_arguments(lora: LoraConfig) -> LoraConfig:
    """Of an adapter from `_placed`: no number that a compiled program depends on is left here but the rank."""
    alphas = tuple((target, float(rank)) for target, rank in lora.ranks)
    return dataclasses.replace(lora, alpha=lora.rank, alphas=alphas, rslora=False, dropout=0.0)

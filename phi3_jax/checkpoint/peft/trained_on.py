"""trained_on.json, beside an adapter: which integers it was trained on (QLoRA), so that other weights are noticed.

It is a file of its own, because PEFT warns of keys that it does not know in adapter_config.json.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import flax.traverse_util

from phi3_jax.json_files import read_object
from phi3_jax.kernels import LoraTensor, PackedTensor, PerLayer, QuantizedTensor
from phi3_jax.model import Params
from phi3_jax.quantization import Format, parse_format, policy_of

TRAINED_ON = "trained_on.json"
_LARGEST = 4096  # bytes that are read


def kind_of_weights(params: Params) -> str:
    """The policy by which weights are integers, such as "int4"; "stored" for another mixture, "" for floats."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    return policy_of({path: _format(leaf) for path, leaf in leaves.items()})


def write_trained_on(folder: Path, weights: str) -> None:
    """Writes beside an adapter what `kind_of_weights` gave for its base; nothing for floats."""
    if weights:
        (folder / TRAINED_ON).write_text(json.dumps({"weights": weights}) + "\n", encoding="utf-8")


def warn_of_others(settings: Path, weights: str) -> None:
    """Warns if an adapter was trained on other weights than those that it is put on.

    Args:
      settings: the adapter's adapter_config.json.
      weights: `kind_of_weights` of what it is put on; "" also where it is merged into floats.
    """
    theirs = _read(settings.with_name(TRAINED_ON))
    if theirs not in ("", weights):
        here = f"goes onto {weights} weights" if weights else "is merged into floats, or put on them"
        warnings.warn(
            f"{settings.parent}: was trained on {theirs} weights ({TRAINED_ON}), but here it {here}, which "
            f"it fits worse; give it with --quantize {theirs} (quantize={theirs!r}), or with a folder of "
            "such weights that phi3-quantize wrote without it",
            stacklevel=4,
        )


def _read(path: Path) -> str:
    """What is written there; "" where nothing can be understood: the adapter is no worse for it."""
    try:
        weights = read_object(path, _LARGEST)["weights"]
        if weights not in ("stored", "int4-mixed"):
            parse_format(weights)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(weights)


def _format(leaf: Any) -> Format | None:
    leaf = leaf[0] if isinstance(leaf, PerLayer) else leaf
    base = leaf.base if isinstance(leaf, LoraTensor) else leaf
    if isinstance(base, QuantizedTensor):
        return Format(base.bits, base.group, base.mins is None)
    if isinstance(base, PackedTensor) and base.scales is not None:
        return Format(8 if base.kind == "int8" else 4, base.group, base.mins is None)
    return None

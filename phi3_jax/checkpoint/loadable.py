"""Whether `load` would read what is about to be written, looked at before anything large is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util

from phi3_jax.config import Phi3Config
from phi3_jax.model import Params, parameter_shapes
from phi3_jax.text import load_tokenizer


def require_shapes(params: Params, config: Phi3Config, target: Path) -> None:
    """Raises ValueError if the parameters are not those of the configuration."""
    wanted = parameter_shapes(config)
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if wrong := sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        path = wrong[0]
        raise ValueError(
            f"{target}: not written: {path} has the shape {found.get(path)}, and the configuration wants "
            f"{wanted.get(path)}; save parameters with their own configuration"
        )


def require_loadable(settings: Mapping[str, Any], config: Phi3Config, partial: Path, target: Path) -> None:
    """Reads back the settings of a config.json, and the tokenizer beside it.

    Args:
      settings: the contents of the config.json.
      config: what they must mean.
      partial: the folder that is being written for `target`, with config.json and the tokenizer's files.

    Raises:
      ValueError: `load` would refuse them, or take the settings for others.
    """
    described = {key: value for key, value in settings.items() if key != "quantization_config"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever loaded the checkpoint was told
            again = Phi3Config.from_hf(described, str(partial / "config.json"))
            if any((partial / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
                load_tokenizer(partial)
    except ValueError as error:
        told = str(error).replace(str(partial), str(target))
        raise ValueError(f"{target}: not written, because it could not be loaded again: {told}") from None
    if again != config:
        raise ValueError(f"{target}: not written, because it would be loaded as {again} instead of {config}")

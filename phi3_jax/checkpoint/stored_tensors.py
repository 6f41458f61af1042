"""A checkpoint's tensors as its files hold them, each read on demand."""

from __future__ import annotations

import os

from phi3_jax.checkpoint import safetensors_files
from phi3_jax.checkpoint.assemble import without_redundant
from phi3_jax.checkpoint.load_save import holds_integers, read_config, resolve
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.checkpoint.unfused import fused, published_names


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, TensorSource]:
    """The tensors by the names of `model.tensor_names`, with which what was made of them can be compared.

    Raises:
      FileNotFoundError, ImportError: as `load`.
      ValueError: as `load`; or the checkpoint is a folder of integers, whose floats are not known.
    """
    place = resolve(path)
    if place.is_file():
        from phi3_jax.checkpoint.gguf.reader import read_gguf  # needs the extra `gguf`

        return dict(read_gguf(place).tensors)
    if holds_integers(place):
        raise ValueError(f"{place}: holds integers; the floats that they were made from are not known")
    config, origin = read_config(place), str(place)
    found = published_names(safetensors_files.read_folder(place), origin)
    return without_redundant(fused(found, config, origin), config, origin)[0]

"""A checkpoint's tensors and an adapter -> the parameter tree: floats are merged, integers keep it beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import jax

from phi3_jax.checkpoint.assemble import assemble, require_room
from phi3_jax.checkpoint.peft import merged_sources, on_integers, read_adapter
from phi3_jax.checkpoint.placement import Device, Layout
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config
from phi3_jax.model import Params
from phi3_jax.progress import OnProgress


def assemble_with_adapter(
    sources: Mapping[str, TensorSource],
    config: Phi3Config,
    dtype: jax.typing.DTypeLike,
    origin: str,
    on_progress: OnProgress | None,
    quantize: str | None,
    layout: Layout,
    device: Device,
    adapter: str | os.PathLike[str] | None,
    merge_adapter: bool,
) -> tuple[Params, Phi3Config]:
    """`assemble` with an adapter -> the parameters, and the configuration that fits them.

    Args:
      adapter: its folder or hub id; None adds nothing. It is read before the weights are.
      merge_adapter: into the floats also where `quantize` then rounds the sum.

    Raises:
      The errors of `assemble` and of `read_adapter`.
    """
    # With a damaged config.json the list of modules could be huge; `assemble` refuses it.
    if adapter is None or config.num_hidden_layers > len(sources):
        return assemble(sources, config, dtype, origin, on_progress, quantize, layout, device), config
    require_room(config, sum(math.prod(source.shape) for source in sources.values()), origin)
    files = read_adapter(adapter, config)
    if quantize is None or merge_adapter:
        sources, config = merged_sources(sources, files, config)
        return assemble(sources, config, dtype, origin, on_progress, quantize, layout, device), config
    params = assemble(sources, config, dtype, origin, on_progress, quantize, layout, device)
    return on_integers(params, config, files, dtype, layout, device)

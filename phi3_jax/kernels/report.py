"""Which implementation runs, and why another does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from phi3_jax.kernels.attention import cuda as cuda_attention
from phi3_jax.kernels.attention import why_not_cpu
from phi3_jax.kernels.cuda import build as cuda
from phi3_jax.kernels.linear.packed import PackedTensor, has_packed
from phi3_jax.kernels.linear.per_layer import has_per_layer
from phi3_jax.kernels.linear.quantized import QuantizedTensor
from phi3_jax.kernels.native.build import library, why_unavailable


def status(
    params: Any = None, cache_dtype: jax.typing.DTypeLike = "float32", head_dim: int | None = None
) -> dict[str, str]:
    """Which implementation "linear" and "attention" (the keys) use on this machine, and why not another.

    Args:
      params: the parameter tree that `linear` is used with; None assumes packed weights.
      cache_dtype: the dtype of the key-value cache that `attention` is used with.
      head_dim: the model's; None assumes one that kernels are made for.
    """
    platform = jax.default_backend()
    if platform == "tpu":
        return {"linear": _on_tpu(params), "attention": "tpu kernel (Pallas)"}
    if platform == "gpu":
        return {"linear": _linear_on_gpu(params), "attention": _attention_on_gpu(cache_dtype, head_dim)}
    if platform != "cpu":
        return dict.fromkeys(("linear", "attention"), f"xla, because there are no kernels for platform {platform} yet")
    if (reason := why_unavailable()) is not None:
        return dict.fromkeys(("linear", "attention"), f"xla, because the CPU kernels cannot be used: {reason}")
    kernels = f"cpu kernels ({isa()})"
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedTensor))
    packed = params is None or any(isinstance(leaf, PackedTensor) for leaf in leaves)
    problem = why_not_cpu(cache_dtype)
    return {
        "linear": kernels
        if packed
        else "xla, because no weights are packed: that takes bfloat16 or integers, and layout='packed'",
        "attention": kernels if problem is None else f"xla, because {problem}",
    }


def _on_tpu(params: Any) -> str:
    """What "linear" uses there; a table of rows that are looked up is no matrix of a product."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    integers = [
        leaf.by_column
        for path, leaf in leaves
        if isinstance(leaf, QuantizedTensor) and "embed_tokens" not in jax.tree_util.keystr(path)
    ]
    if integers and not all(integers):
        return "xla, because integers lie by rows, which takes memory for floats: load them with layout='columns'"
    return "tpu kernel (Pallas)" if integers else "xla, which reads floats where they lie"


def _linear_on_gpu(params: Any) -> str:
    if (reason := cuda.why_unavailable()) is not None:
        return f"xla, because the kernels for NVIDIA cards cannot be used: {reason}"
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    integers = [leaf.by_column for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    if has_packed(params) or any(integers):
        return "xla, because weights lie as other hardware reads them: load them with layout='layers'"
    if integers or params is None:
        return "cuda kernels"
    if has_per_layer(params):
        return "xla, which reads floats where they lie"
    return "xla, which copies each layer of a stack of floats first: load them with layout='layers'"


def _attention_on_gpu(cache_dtype: jax.typing.DTypeLike, head_dim: int | None) -> str:
    if (reason := cuda.why_unavailable()) is not None:
        return f"xla, because the kernels for NVIDIA cards cannot be used: {reason}"
    problem = cuda_attention.why_not_types(cache_dtype, head_dim or cuda_attention.HEAD_DIMS[0])
    return "cuda kernels" if problem is None else f"xla, because {problem}"


def isa() -> str | None:
    """The instruction set of the loaded kernels: "avx512_bf16", "avx2" or the like; None without kernels."""
    return None if why_unavailable() else Path(library()._name).stem

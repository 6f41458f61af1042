"""Attention without a cache, for training: nothing of T x S scores is kept for the backward pass.

On NVIDIA cards cuDNN's kernels compute it, on TPUs splash attention, where they can; blockwise.py elsewhere. This is
decided when a program is traced, by `jax.default_backend()`: a derivative through `platform_dependent` would keep what
either of its branches needs.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from phi3_jax.kernels.attention import blockwise, cudnn, splash
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

Implementation = Literal["blockwise", "cudnn", "splash"]
_FUNCTIONS = {"blockwise": blockwise.attention, "cudnn": cudnn.attention, "splash": splash.attention}
_OF_CUDNN = "dot_product_attention_fwd_wrapper"  # JAX gives its results no name


def attention(
    q: jax.Array, kv: KeysValues, visible: Visibility, implementation: Implementation | None = None
) -> jax.Array:
    """See `kernels.attention`; the keys are those of one layer, as floats of the queries' dtype.

    The output of a query that sees no key is 0, and nothing gets a gradient from it.

    Args:
      q, kv, visible: see `kernels.attention`. cuDNN and splash attention need `visible.in_order`.
      implementation: None takes the best for `jax.default_backend()`; a named one is used or fails.
    """
    name = implementation or choice(q, kv, visible)[0]
    return _FUNCTIONS[name](q, kv, visible)


def choice(q: Any, kv: Any, visible: Any) -> tuple[Implementation, str]:
    """What `attention` uses for arrays of these shapes on `jax.default_backend()`, and why nothing faster, or ""."""
    platform = jax.default_backend()
    if platform == "gpu":
        reason = cudnn.why_not(q, kv, visible)
        return ("cudnn", "") if reason is None else ("blockwise", reason)
    if platform == "tpu":
        reason = splash.why_not(q, kv, visible)
        return ("splash", "") if reason is None else ("blockwise", reason)
    return "blockwise", ""


def is_kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A rematerialisation policy: keeps what the backward pass of attention needs, of whichever implementation."""
    named: Any = jax.checkpoint_policies.save_only_these_names(blockwise.KEPT)
    return primitive.name == _OF_CUDNN or bool(named(primitive, *arguments, **parameters))

"""cuDNN's attention for training on NVIDIA cards, as `jax.nn.dot_product_attention` offers it.

Axis letters: B batch, T query, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

DTYPES = ("bfloat16", "float16")


def attention(q: jax.Array, kv: KeysValues, visible: Visibility) -> jax.Array:
    """See `kernels.attention`, and `why_not`. A query without keys (padding) gives zeros."""
    # What is last in a row is seen by nothing before it: causality is enough, and padding needs no lengths.
    T, window = q.shape[1], visible.window
    out = jax.nn.dot_product_attention(
        q,
        kv.k.swapaxes(1, 2),
        kv.v.swapaxes(1, 2),
        is_causal=True,  # without it, a window to the left would see the future
        local_window_size=None if window is None or window >= T else (window - 1, 0),  # beside the query itself
        implementation="cudnn",
    )
    return jnp.where(visible.q_positions[..., None, None] >= 0, out, 0)


def why_not(q: jax.Array, kv: KeysValues, visible: Visibility) -> str | None:
    """Why it cannot be used for queries [B, T, N, H]; None if it can."""
    if not visible.in_order:
        return "cuDNN's attention takes only whole sequences from slot 0 on"
    if visible.q_segments is not None:
        return "cuDNN's attention takes one sequence per row (pack=false)"
    if q.dtype not in DTYPES:
        return f"cuDNN's attention takes {' and '.join(DTYPES)}, not {q.dtype}"
    try:  # JAX knows the limits of this card and this cuDNN
        gradient = jax.grad(lambda *arguments: attention(*arguments).astype(jnp.float32).sum())
        jax.eval_shape(gradient, q, kv, visible)
    except (RuntimeError, NotImplementedError) as error:
        return f"cuDNN's attention cannot be used: {error}"
    return None

"""Splash attention for training on TPUs: a kernel that comes with JAX.

Axis letters: B batch, T query, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.blockwise import KEPT

_LANES = 128
_SIDES = (512, 256, _LANES)  # of blocks: the largest that adds little to the tokens


def attention(q: jax.Array, kv: KeysValues, visible: Visibility, interpret: bool = False) -> jax.Array:
    """See `kernels.attention`, and `why_not`. A query without keys (padding) gives zeros.

    `interpret` computes without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # imported where there is a TPU

    _, T, N, H = q.shape
    side = next(each for each in _SIDES if -T % each <= T // 8 or each == _LANES)
    more = -T % side
    positions = visible.q_positions
    ids = jnp.zeros_like(positions) if visible.q_segments is None else visible.q_segments
    ids = jnp.where(positions >= 0, ids, -1)  # padding sees padding: a row of scores must not be empty
    ids = jnp.pad(ids, [(0, 0), (0, more)], constant_values=-1)
    scaled = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype).swapaxes(1, 2)
    padded = [jnp.pad(each, [(0, 0), (0, 0), (0, more), (0, 0)]) for each in (scaled, kv.k, kv.v)]
    kernel = _kernel(N, T + more, side, visible.window, interpret)
    out = jax.vmap(kernel)(*padded, SegmentIds(ids, ids))
    return jnp.where(positions[..., None, None] >= 0, out[:, :, :T].swapaxes(1, 2), 0).astype(q.dtype)


def why_not(q: jax.Array, kv: KeysValues, visible: Visibility) -> str | None:
    """Why it cannot be used for queries [B, T, N, H]; None if it can."""
    if not visible.in_order:
        return "splash attention takes only whole sequences from slot 0 on"
    if q.dtype != jnp.bfloat16:
        return f"splash attention is exact only for bfloat16, not for {q.dtype}"
    if jax.device_count() > 1:
        return f"splash attention is for one device, and there are {jax.device_count()}"
    return None


def _kernel(heads: int, tokens: int, side: int, window: int | None, interpret: bool) -> Callable[..., jax.Array]:
    """The kernel for one row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sizes = splash.BlockSizes(
        block_q=side,
        block_kv=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_q_dq=side,
        block_kv_dq=side,
    )
    shape = (tokens, tokens)  # of a mask that is computed, not stored
    is_whole = window is None or window >= tokens
    beside = 0 if window is None else window - 1  # keys that a query sees beside its own
    mask: splash.Mask = splash.CausalMask(shape) if is_whole else splash.LocalMask(shape, (beside, 0), offset=0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

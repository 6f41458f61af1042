"""Rounding to bfloat16 by chance, for weights that are trained in it.

The 8 bits of a bfloat16 are too few for small updates: added to the nearest number they are lost, step after step. Here
a number between two neighbours becomes either of them, the nearer one more likely, so that the mean is the number
itself (Gupta et al., arXiv:1502.02551).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [...] -> bfloat16 [...], whose mean over keys is x.

    What bfloat16 can represent, infinities and NaN stay as they are. A finite number stays finite: beyond the largest
    bfloat16 it becomes that.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The lower half of a float32 is how far it is from the next bfloat16 towards 0, on the way to the one after.
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + chance) >> 16).astype(jnp.uint16), jnp.bfloat16)
    largest = jnp.copysign(jnp.finfo(jnp.bfloat16).max, x).astype(jnp.bfloat16)
    rounded = jnp.where(jnp.isinf(rounded), largest, rounded)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """params + updates (float32), in the dtypes of params: to bfloat16 by chance, with random numbers for each leaf."""
    leaves, tree = jax.tree.flatten(params)
    added = []
    for number, (leaf, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        total = leaf.astype(jnp.float32) + update
        if leaf.dtype == jnp.bfloat16:
            added.append(stochastic_round(total, jax.random.fold_in(key, number)))
        else:
            added.append(total.astype(leaf.dtype))
    return jax.tree.unflatten(tree, added)

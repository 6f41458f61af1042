"""The product with a weight that has a low-rank update, and its rows (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353).

Axis letters: L layer, O outputs, I inputs, R rank of the update, B rows of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.linear import xla
from phi3_jax.kernels.native.build import why_unavailable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraTensor:
    """A weight [O, I], or a stack [L, O, I], that stands for gain * (base + scaling * b @ a).

    The update is computed in the dtype of a and b, as in PEFT, and the sum is cast to the dtype of the base's product:
    until then, a float32 adapter of a bfloat16 base keeps its full precision.

    Attributes:
      base: any other weight that `kernels.linear` takes.
      a: float [(L,) R, I].
      b: float [(L,) O, R].
      gain: float [(L,) O], DoRA's magnitudes divided by the norms of the weight's rows; None means 1.
      keys: [(L,)] random keys for dropout; None: no dropout.
      scaling: the factor of b @ a.
      dropout: the fraction of the update's inputs that is dropped (with DoRA also of the gain's, as in PEFT).
    """

    base: Any
    a: jax.Array
    b: jax.Array
    gain: jax.Array | None
    keys: jax.Array | None
    scaling: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight that this stands for."""
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraRows:
    """A weight [O, I], or a stack [L, O, I], that has another low-rank update for each row of a batch.

    The updates of several adapters stand side by side in a and b. A row has a scaling for the ranks of its own one, and
    0 for those of others: in a row whose scaling is 0 everywhere this is the base, bit for bit.

    Attributes:
      base: any other weight that `kernels.linear` takes, but a LoraTensor.
      a: float32 [(L,) R, I].
      b: float32 [(L,) R, O], the transpose of what LoraTensor has.
      scaling: float32 [B, R].
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scaling: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight that this stands for."""
        return self.base.dtype


def linear(
    x: jax.Array, weight: LoraTensor, layer: jax.Array | None, product: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """See `kernels.linear`; `product` multiplies an input with the weight's base."""
    base = product(x)
    seen = x.astype(weight.a.dtype)
    if weight.keys is not None:
        kept = jax.random.bernoulli(_of(weight.keys, layer), 1 - weight.dropout, x.shape)
        seen = jnp.where(kept, seen / (1 - weight.dropout), 0)
    # Scaled at rank R, where the array is the smallest.
    update = _widen(weight.scaling * xla.linear(seen, weight.a, layer, None), xla.dense(weight.b, layer, None))
    if weight.gain is None:
        return (base + update).astype(base.dtype)
    gain = _of(weight.gain, layer)
    # PEFT's formula. With dropout it is not gain * (base + update): the product with the whole input keeps gain 1.
    scaled = base if weight.keys is None else product(seen.astype(x.dtype))
    return (base + (gain - 1) * scaled + gain * update).astype(base.dtype)


def rows(weight: LoraTensor, ids: jax.Array, fixed: jax.Array | bool, base: jax.Array) -> jax.Array:
    """See `kernels.linear.rows`; `base` are those of the weight's base. As in PEFT, nothing is dropped here."""
    if weight.gain is not None:
        raise ValueError("DoRA of an embedding gives its columns norms, which is not computed by rows: merge it")
    b = jnp.take(weight.b, ids, axis=0, mode="clip")  # an id out of range is NaN in the base's rows
    b = jnp.where(fixed, jax.lax.stop_gradient(b), b)
    update = weight.scaling * jnp.einsum("...r,ri->...i", b, weight.a, precision=jax.lax.Precision.HIGHEST)
    return (base + update).astype(base.dtype)


def linear_of_rows(
    x: jax.Array, weight: LoraRows, layer: jax.Array | None, product: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`linear` of x [B, ..., I], each row with its own update.

    The CPU kernel gives a row the same bits whatever other rows and adapters there are; XLA does not promise it.
    """
    base, on_cpu = product(x), jax.default_backend() == "cpu" and why_unavailable() is None
    return by_platform(_rows_by_xla, cpu=_rows_by_cpu if on_cpu else None)(base, x, weight, layer)


def _rows_by_xla(base: jax.Array, x: jax.Array, weight: LoraRows, layer: jax.Array | None) -> jax.Array:
    narrow = _scaled(weight, xla.linear(x.astype(weight.a.dtype), weight.a, layer, None))
    return _added(weight, base, _times(narrow, _of(weight.b, layer)))


def _rows_by_cpu(base: jax.Array, x: jax.Array, weight: LoraRows, layer: jax.Array | None) -> jax.Array:
    a, b = (each[None] if layer is None else each for each in (weight.a, weight.b))
    index = jnp.int32(0) if layer is None else layer.astype(jnp.int32)
    out = jax.ShapeDtypeStruct(base.shape, jnp.float32)
    call = jax.ffi.ffi_call("phi3_add_updates", out, input_output_aliases={0: 0}, vmap_method="sequential")
    found = call(base.astype(jnp.float32), x.astype(jnp.float32), a, b, weight.scaling, index)
    return found.astype(base.dtype)


def rows_of_rows(weight: LoraRows, ids: jax.Array, fixed: jax.Array | bool, base: jax.Array) -> jax.Array:
    """`rows` of ids [B, ...], each row with its own update of the table; `base` are those of the weight's base."""
    b = jnp.take(weight.b, ids, axis=1, mode="clip")  # [R, B, ...]; an id out of range is NaN in the base's rows
    update = _times(_scaled(weight, jnp.moveaxis(b, 0, -1)), weight.a)
    return jnp.where(fixed, base, _added(weight, base, update))


def _scaled(weight: LoraRows, narrow: jax.Array) -> jax.Array:
    """[B, ..., R] with each row's scaling."""
    scaling = _beside(weight.scaling, narrow)
    return jnp.where(scaling != 0, scaling * narrow, 0)  # what is infinite for others stays there


def _times(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    return jnp.einsum("...r,ro->...o", narrow, wide, precision=jax.lax.Precision.HIGHEST)


def _added(weight: LoraRows, base: jax.Array, update: jax.Array) -> jax.Array:
    """base + update in the rows that have one; in others the base, -0 included."""
    has_one = _beside((weight.scaling != 0).any(axis=1, keepdims=True), base)
    return jnp.where(has_one, (base + update).astype(base.dtype), base)


def _beside(of_rows: jax.Array, x: jax.Array) -> jax.Array:
    """[B, R] with axes of size 1 between the two, as x [B, ..., R] has them."""
    return of_rows.reshape(of_rows.shape[0], *[1] * (x.ndim - 2), of_rows.shape[1])


@jax.custom_vjp
def _widen(x: jax.Array, b: jax.Array) -> jax.Array:
    """x @ b.T: [..., R], [O, R] -> [..., O]."""
    return xla.linear(x, b, None, None)


def _widen_backward(kept: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, b = kept
    exact = jax.lax.Precision.HIGHEST
    # XLA's CPU backend transposes the first factor in memory: the small x here, the large d_out in JAX's derivative.
    d_b = jnp.einsum("...r,...o->ro", x, d_out, precision=exact).T
    return jnp.einsum("...o,or->...r", d_out, b, precision=exact), d_b


_widen.defvjp(lambda x, b: (_widen(x, b), (x, b)), _widen_backward)


def _of(stack: jax.Array, layer: jax.Array | None) -> jax.Array:
    return stack if layer is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

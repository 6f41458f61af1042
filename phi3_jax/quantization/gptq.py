"""One matrix rounded so that its products with real inputs change little: GPTQ (arXiv:2210.17323).

The weights of one input after another are rounded. As far as inputs are correlated, the error of the outputs is
compensated by changing the weights of inputs that are not rounded yet.

Axis letters: O outputs, I inputs, J inputs rounded up to whole blocks, S inputs of a block, G inputs of a group, A
groups of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from phi3_jax.kernels import QuantizedTensor
from phi3_jax.quantization import rounding
from phi3_jax.quantization.policy import Format
from phi3_jax.quantization.rounding import Fit

_BLOCK = 128  # inputs; the weights after a block are updated once per block, for fewer passes over memory
_EXACT = jax.lax.Precision.HIGHEST


def gptq(weight: jax.Array, hessian: jax.Array, form: Format, damping: float = 0.01) -> QuantizedTensor:
    """Rounds a weight [O, I] for inputs x whose sum of x x^T is `hessian` [I, I].

    Args:
      damping: added to the hessian's diagonal, as a fraction of the diagonal's mean, so that every input counts.

    Raises:
      ValueError: there are weights or inputs that are not finite, or weights whose scales do not fit float16; the
        damped hessian is not positive definite in float32.
    """
    if not bool(jnp.isfinite(hessian).all()):
        raise ValueError("there are inputs that are not finite: the model gives no numbers for this text")
    tensor, error, factored = _gptq(weight, hessian, form, damping)
    if not bool(factored):
        raise ValueError("the inputs are too alike for float32: calibrate with more text, of more kinds")
    rounding.check(float(error), float(rounding.largest_of(weight)))
    return tensor


@functools.partial(jax.jit, static_argnames="form")
def _gptq(
    weight: jax.Array, hessian: jax.Array, form: Format, damping: float
) -> tuple[QuantizedTensor, jax.Array, jax.Array]:
    (outputs, inputs), G, S = weight.shape, form.group, _BLOCK
    J = -(-inputs // S) * S
    U = inverse_factor(hessian, damping, J)
    # The cost of an input's squared error, when the inputs before it are already rounded.
    importance = jnp.where(jnp.arange(J) < inputs, 1 / jnp.diag(U) ** 2, 0)

    def round_input(j: jax.Array, state: tuple[jax.Array, ...], start: jax.Array, fit: Fit) -> tuple[jax.Array, ...]:
        """Rounds input start + j of the block w [S, O], with U [S, S], and compensates in the rest of the block."""
        w, U, q, missed = state
        i = start + j
        rounded = rounding.integers(w[i], fit.scale, fit.min, form)
        error = (w[i] - rounding.floats(rounded, fit.scale, fit.min, form)) / U[i, i]
        w = w - U[i][:, None] * error
        return w, U, q.at[i].set(rounded.astype(jnp.uint8)), missed.at[i].set(error)

    def round_group(g: jax.Array, state: tuple[jax.Array, ...], costs: jax.Array) -> tuple[jax.Array, ...]:
        w, U, q, missed, fits = state
        x, cost = (jax.lax.dynamic_slice_in_dim(each, g * G, G) for each in (w, costs))
        fit = rounding.search(x, jnp.broadcast_to(cost[:, None], x.shape), form)
        fits = jax.tree.map(lambda stack, new: stack.at[g].set(new), fits, fit)
        step = functools.partial(round_input, start=g * G, fit=fit)
        return (*jax.lax.fori_loop(0, G, step, (w, U, q, missed)), fits)

    def round_block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Fit]]:
        block, rows, costs = (jax.lax.dynamic_slice_in_dim(each, start, S) for each in (w, U, importance))
        inner = jax.lax.dynamic_slice_in_dim(rows, start, S, axis=1)
        q, missed, fits = jnp.zeros((S, outputs), jnp.uint8), jnp.zeros((S, outputs)), jnp.zeros((S // G, outputs))
        state = (block, inner, q, missed, Fit(fits, fits, fits))
        _, _, q, missed, fit = jax.lax.fori_loop(0, S // G, functools.partial(round_group, costs=costs), state)
        # U is 0 to the left: the blocks before are not changed.
        return w - jnp.einsum("SJ,SO->JO", rows, missed, precision=_EXACT), (q, fit)

    w = jnp.pad(weight.astype(jnp.float32).T, ((0, J - inputs), (0, 0)), mode="edge")  # [J, O]
    _, (q, fits) = jax.lax.scan(round_block, w, jnp.arange(0, J, S))
    A = -(-inputs // G)  # J may hold whole groups that are only padding
    fit = jax.tree.map(lambda each: each.reshape(-1, outputs)[:A].T.reshape(-1), fits)  # [O * A]
    q = q.reshape(-1, G, outputs)[:A].transpose(1, 2, 0).reshape(G, -1)
    return rounding.assemble(q, fit, form, outputs, inputs), fit.error.sum(), jnp.isfinite(U).all()


def inverse_factor(hessian: jax.Array, damping: float, size: int) -> jax.Array:
    """The upper triangular U with U^T U = H^-1; H [size, size] is the hessian, damped, and padded by its mean."""
    inputs = len(hessian)
    mean = jnp.diag(hessian).mean()
    mean = jnp.where(mean > 0, mean, 1)  # all inputs were zero: plain rounding
    hessian = hessian + damping * mean * jnp.eye(inputs)
    padded = mean * jnp.eye(size).at[:inputs, :inputs].set(hessian / mean)
    # In reversed order, Cholesky's factor is upper triangular: H = R R^T, and U = R^-1, without inverting H itself.
    R = jnp.linalg.cholesky(padded[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(R, jnp.eye(size), lower=False)

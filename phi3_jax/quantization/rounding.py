"""Floats -> integers without data: a search finds the scale of each group that gives the smallest squared error.

A group of weights becomes scale * (q - zero), or scale * q + min. Several scales are tried, around the one that just
covers the largest weight: each is rounded to float16, used to round the weights, and fitted to the resulting integers
by least squares; the best one is kept. The largest weight of a symmetric group always lies on the longer, negative side
of the integers, if necessary by a negative scale, as in GGUF's Q4_0.

Axis letters: L layer, O outputs, I inputs, J inputs rounded up to whole groups, A = J / G groups, G inputs of a group,
R outputs that are rounded at a time, M = R * A.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear.quantized import LARGEST, SMALLEST, ZERO
from phi3_jax.model import require_floats
from phi3_jax.progress import OnProgress
from phi3_jax.quantization.policy import Format, formats

_BLOCK = 1 << 20  # weights that are rounded at a time: one compiled program serves many matrices, in little memory
_UNROLLED = 8  # inputs of a group that are handled in one iteration of the compiled loop
_SMALLEST_SCALE = 2.0**-20  # float16 has 4 bits of precision left there


class Fit(NamedTuple):
    """Groups' scales and mins, rounded to float16, and the squared errors that they give; [M] each."""

    error: jax.Array
    scale: jax.Array
    min: jax.Array


def quantize(weight: Any, form: Format, importance: Any = None) -> QuantizedTensor:
    """Rounds a matrix [O, I], or a stack [L, O, I] one layer after another, floats of any dtype.

    Args:
      importance: float [I], the weight of each input's squared error; 1 by default.

    Raises:
      ValueError: there are weights that are not finite, or whose scales do not fit float16.
    """
    if weight.ndim == 3:
        layers = [quantize(each, form, importance) for each in weight]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    if importance is None and weight.shape[1] % form.group:
        importance = np.ones(weight.shape[1], np.float32)  # so that padding can be given the importance 0
    outputs = weight.shape[0]
    R = -(-outputs // -(-weight.size // _BLOCK))
    rows, largest = [], 0.0
    for start in range(0, outputs, R):
        block = weight[min(start, outputs - R) :][:R]  # the last one overlaps: one shape needs one program only
        rounded, error, block_largest = _round_rows(block, importance, form)
        largest = float(np.maximum(largest, block_largest))  # NaN if either is NaN
        check(float(error), largest)
        rows.append(jax.tree.map(operator.itemgetter(slice(max(0, start + R - outputs), None)), rounded))
    if 0 < largest < ZERO[form.bits] * _SMALLEST_SCALE:
        raise ValueError(f"the weights, of which {largest:.1e} is the largest, are too small for scales in float16")
    return rows[0] if len(rows) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def quantize_params(params: Any, policy: str, on_progress: OnProgress | None = None) -> Any:
    """Rounds the matrices of a parameter tree.

    Args:
      policy: see `policy.formats`.
      on_progress: called with (weights done, weights in all) after each leaf.

    Raises:
      ValueError: there is no such policy; weights are quantised already; or see `quantize`.
    """
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    require_floats(leaves)
    total, done = sum(leaf.size for leaf in leaves.values()), 0
    for path, form in formats(policy, leaves).items():
        done += leaves[path].size
        if form is not None:
            try:
                leaves[path] = quantize(leaves[path], form)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        if on_progress:
            on_progress(done, total)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def check(error: float, largest: float) -> None:
    """Raises ValueError if the largest weight or the squared error is not finite: the weights could not be rounded."""
    if not np.isfinite(largest):
        raise ValueError("there are weights that are not finite: the file is damaged, or the training diverged")
    if not np.isfinite(error):
        raise ValueError(f"the weights, of which {largest:.1e} is the largest, are too large for scales in float16")


@functools.partial(jax.jit, static_argnames="form")
def _round_rows(
    weight: jax.Array, importance: jax.Array | None, form: Format
) -> tuple[QuantizedTensor, jax.Array, jax.Array]:
    """weight [R, I] -> (its integers, the squared error, the largest weight)."""
    (R, inputs), G = weight.shape, form.group
    padding = -inputs % G
    x = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padding)), mode="edge")
    x = x.reshape(-1, G).T  # [G, M]
    if importance is not None:
        per_group = jnp.pad(jnp.asarray(importance, jnp.float32), (0, padding)).reshape(-1, G)
        importance = jnp.tile(per_group.T, (1, R))  # [G, M]
    fit = search(x, importance, form)
    q = integers(x, fit.scale, fit.min, form).astype(jnp.uint8)
    tensor = assemble(q, fit, form, R, inputs)
    return tensor, fit.error.sum(), largest_of(x)


def largest_of(x: jax.Array) -> jax.Array:
    """The largest magnitude; NaN where anything is not finite (XLA's maximum overlooks NaN on some platforms)."""
    return jnp.where(jnp.isfinite(x).all(), jnp.abs(x).max(), jnp.nan)


def assemble(q: jax.Array, fit: Fit, form: Format, outputs: int, columns: int) -> QuantizedTensor:
    """The integers q uint8 [G, M] of `outputs` rows, and what they were rounded with, as a QuantizedTensor."""
    if form.bits == 4:
        q = q[0::2] | q[1::2] << 4
    scales, mins = (each.astype(jnp.float16).reshape(outputs, -1) for each in (fit.scale, fit.min))
    return QuantizedTensor(q.T.reshape(outputs, -1), scales, None if form.symmetric else mins, form.bits, columns)


def integers(x: jax.Array, scale: jax.Array, minimum: jax.Array, form: Format) -> jax.Array:
    """The nearest integers of x [..., M], as floats; scale and minimum are [M]."""
    inverse = jnp.where(scale == 0, 0, 1 / scale)
    q = jnp.round((x - minimum) * inverse) + (ZERO[form.bits] if form.symmetric else 0)
    return jnp.clip(q, SMALLEST[form.bits], LARGEST[form.bits])


def floats(q: jax.Array, scale: jax.Array, minimum: jax.Array, form: Format) -> jax.Array:
    """The weights that integers, given as floats, represent."""
    return (q - ZERO[form.bits]) * scale if form.symmetric else q * scale + minimum


def search(x: jax.Array, importance: jax.Array | None, form: Format) -> Fit:
    """The best scale and min for each column of x [G, M]; importance is [G, M] or None."""
    low, high = x.min(0), x.max(0)
    tried = jnp.asarray(_TRIED[form.bits, form.symmetric], jnp.float32)

    def attempt(i: jax.Array, best: Fit) -> Fit:
        scale, minimum = _first(low, high, tried[i], form)
        for _ in range(2):
            error, fitted = _evaluate(x, importance, scale, minimum, form)
            best = jax.tree.map(functools.partial(jnp.where, error < best.error), Fit(error, scale, minimum), best)
            scale, minimum = fitted
        return best

    nothing = Fit(jnp.full(low.shape, jnp.inf), jnp.zeros_like(low), jnp.zeros_like(low))
    return jax.lax.fori_loop(0, len(tried), attempt, nothing)


# What is tried, by bits and symmetry. Symmetric: the integer to which the largest weight is mapped. Asymmetric: the
# fractions of the range of weights that are cut off at its lower and upper end.
_TRIED: dict[tuple[int, bool], list[Any]] = {
    (4, True): list(np.linspace(6, 9, 13)),
    (8, True): list(np.linspace(122, 127, 6)),
    (4, False): list(itertools.product(np.linspace(-0.04, 0.16, 6), repeat=2)),
    (8, False): list(itertools.product(np.linspace(-0.005, 0.01, 4), repeat=2)),
}


def _first(low: jax.Array, high: jax.Array, tried: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """The first scale and min of an attempt, for groups whose weights lie between low and high."""
    if form.symmetric:
        return _half(-jnp.where(high > -low, high, low) / tried), jnp.zeros_like(low)
    minimum = _half(low + tried[0] * (high - low))
    steps = LARGEST[form.bits] - SMALLEST[form.bits]
    scale = _half((high - tried[1] * (high - low) - minimum) / steps)
    return scale, _half(minimum - SMALLEST[form.bits] * scale)


def _evaluate(
    x: jax.Array, importance: jax.Array | None, scale: jax.Array, minimum: jax.Array, form: Format
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The squared error of each column of x [G, M], and the scale and min that are best for the integers it becomes."""
    zero = ZERO[form.bits] if form.symmetric else 0

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        error, c_sum, x_sum, p_sum, pp_sum, xp_sum = sums
        # A loop instead of reductions: XLA makes one vectorised pass of it, which is ten times as fast.
        for each in range(_UNROLLED):
            row = x[_UNROLLED * i + each]
            q = integers(row, scale, minimum, form)
            p, c = q - zero, 1 if importance is None else importance[_UNROLLED * i + each]
            rest = row - floats(q, scale, minimum, form)
            error += c * rest * rest
            c_sum, x_sum, p_sum = c_sum + c, x_sum + c * row, p_sum + c * p
            pp_sum, xp_sum = pp_sum + c * p * p, xp_sum + c * row * p
        return error, c_sum, x_sum, p_sum, pp_sum, xp_sum

    sums = jax.lax.fori_loop(0, form.group // _UNROLLED, add, (jnp.zeros_like(scale),) * 6)
    error, c_sum, x_sum, p_sum, pp_sum, xp_sum = sums
    if form.symmetric:
        return error, (_half(jnp.where(pp_sum > 0, xp_sum / pp_sum, scale)), minimum)
    spread = c_sum * pp_sum - p_sum * p_sum
    scale = _half(jnp.where(spread > 0, (c_sum * xp_sum - p_sum * x_sum) / spread, scale))
    return error, (scale, _half(jnp.where(c_sum > 0, (x_sum - scale * p_sum) / c_sum, minimum)))


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(jnp.float32)

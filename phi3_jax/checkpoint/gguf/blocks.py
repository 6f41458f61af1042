"""GGUF's quantised blocks -> the integers of a `QuantizedTensor` (quantized.py), not converted to floats in between.

A loader finds them in two fields of a GGUF file's TensorSource (tensor_source.py):

    form: IntegerForm | None                    # (bits, has_mins), known before anything is read; None: floats only
    quantized: Callable[[], IntegerRows | None] # reads; IntegerRows is the tuple (values, scales, mins, bits)

The result of `quantized()` has mins exactly if `form.has_mins`. It is None, and `read()` must be used, if `form` is
None or if the file has integers that a QuantizedTensor cannot express exactly. `with_mins` turns symmetric rows into
rows with mins, for stacks in which some layers have them.

A block has 32 or 256 neighbouring inputs (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h):

    Q8_0: float16 d; 32 int8 q                                        weight = d q
    Q4_0: float16 d; 32 q of four bits                                weight = d (q - 8)
    Q4_1: float16 d, m; 32 q of four bits                             weight = d q + m
    Q4_K: float16 d, n; 8 scales s and 8 minima m of six bits; 256 q  weight = d s q - n m, s and m for 32 inputs each

Axis letters: O outputs, I inputs, A = I / 32 groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from phi3_jax.kernels.linear.quantized import ZERO

GROUP = 32  # inputs that share a scale
_CHUNK = 1 << 20  # bytes of the file that are unpacked at a time: their intermediates stay in the processor's cache


class IntegerForm(NamedTuple):
    """The form of a tensor's integers: 8 or 4 bits, symmetric or with an offset for each group."""

    bits: int
    has_mins: bool


class IntegerRows(NamedTuple):
    """The fields of a QuantizedTensor [O, I] as numpy arrays.

    Attributes:
      values: uint8 [O, I] (8 bits) or [O, I / 2] (4 bits).
      scales: float16 [O, A].
      mins: float16 [O, A], or None.
      bits: 8 or 4.
    """

    values: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None
    bits: int

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> IntegerRows:
        """The rows with `change` applied to each of the arrays."""
        mins = None if self.mins is None else change(self.mins)
        return IntegerRows(change(self.values), change(self.scales), mins, self.bits)


FORMS = {
    "Q8_0": IntegerForm(8, has_mins=False),
    "Q4_0": IntegerForm(4, has_mins=False),
    "Q4_1": IntegerForm(4, has_mins=True),
    "Q4_K": IntegerForm(4, has_mins=True),
}


def unpack(kind: str, raw: np.ndarray) -> IntegerRows | None:
    """The integers of a tensor, which represent the file's weights exactly, except with Q4_K.

    Q4_K's scales and minima are products of two numbers that are rounded to float16 here.

    Args:
      kind: a key of FORMS.
      raw: uint8 [O, bytes], as the file has it.

    Returns:
      The rows, or None for a Q8_0 tensor in which a q is -128: the range here is symmetric, -127 to 127, and
      llama.cpp's quantiser writes no other values.
    """
    size, unpack_blocks = _KINDS[kind]
    form, rows = FORMS[kind], len(raw)
    groups = raw.shape[1] // size * (8 if kind == "Q4_K" else 1)
    values = np.empty((rows, groups * GROUP * form.bits // 8), np.uint8)
    scales = np.empty((rows, groups), np.float16)
    mins = np.empty((rows, groups), np.float16) if form.has_mins else None
    step = max(1, _CHUNK // raw.shape[1])
    for start in range(0, rows, step):
        part = slice(start, start + step)
        blocks = np.ascontiguousarray(raw[part]).reshape(-1, size)
        v, s, m = unpack_blocks(blocks)
        if kind == "Q8_0" and not v.all():
            return None
        values[part], scales[part] = v.reshape(-1, values.shape[1]), s.reshape(-1, groups)
        if mins is not None and m is not None:
            mins[part] = m.reshape(-1, groups)
    return IntegerRows(values, scales, mins, form.bits)


def with_mins(rows: IntegerRows) -> IntegerRows | None:
    """The same weights with an offset for each group; None where -zero * scale is too large for a float16.

    The offset is exact: a power of two times the scale.
    """
    if rows.mins is not None:
        return rows
    with np.errstate(over="ignore"):
        mins = rows.scales * np.float16(-ZERO[rows.bits])
    exact = np.isfinite(mins) | ~np.isfinite(rows.scales)
    return rows._replace(mins=mins) if exact.all() else None


def fused_form(kinds: Sequence[str]) -> IntegerForm | None:
    """The common form of tensors of one width whose rows are concatenated; None if they have none in common."""
    forms = [FORMS.get(kind) for kind in kinds]
    if any(form is None for form in forms) or len({form.bits for form in forms if form}) > 1:
        return None
    return max(form for form in forms if form)  # with mins if one has them


def fuse(parts: Sequence[IntegerRows | None]) -> IntegerRows | None:
    """Concatenates the rows of tensors; None if one of them is None, or needs mins that it cannot be given."""
    if any(part is not None and part.mins is not None for part in parts):
        parts = [part and with_mins(part) for part in parts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if len(known) == 1:
        return known[0]
    mins = [part.mins for part in known if part.mins is not None]
    return IntegerRows(
        np.concatenate([part.values for part in known]),
        np.concatenate([part.scales for part in known]),
        np.concatenate(mins) if mins else None,
        known[0].bits,
    )


# One for each kind: uint8 [blocks, bytes of one] -> values, scales, mins.
_Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    # int8 + 128 as uint8: flips the sign bit.
    return blocks[:, 2:] ^ np.uint8(0x80), _half(blocks, 0), None


def _q4_0(blocks: np.ndarray) -> _Unpacked:
    return _pair_neighbours(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Unpacked:
    return _pair_neighbours(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 1)


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    d, n = (_half(blocks, i).astype(np.float32)[:, None] for i in (0, 1))
    # Twelve bytes, read as three numbers of four: the low six bits of the first are scales 0-3, of the second minima
    # 0-3. The third holds the low four bits of scales (lower halves) and minima 4-7; their high two bits are the top
    # ones of the first and the second.
    first, second, third = (blocks.view("<u4")[:, i] for i in (1, 2, 3))
    s = np.stack([first & 0x3F3F3F3F, third & 0x0F0F0F0F | first >> 2 & 0x30303030], axis=1).view(np.uint8)
    m = np.stack([second & 0x3F3F3F3F, third >> 4 & 0x0F0F0F0F | second >> 2 & 0x30303030], axis=1).view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        return _pair_neighbours(blocks[:, 16:]), (d * s).astype(np.float16), (-n * m).astype(np.float16)


def _half(blocks: np.ndarray, index: int) -> np.ndarray:
    return blocks.view("<f2")[:, index]


def _pair_neighbours(quants: np.ndarray) -> np.ndarray:
    """4-bit integers in ggml's order -> ours: uint8 [blocks, 16 r] -> the same shape.

    ggml's byte i of a run holds input i in its lower half and an input of the run's second half in its upper one; a run
    has 16 bytes for 32 inputs, or with Q4_K 32 bytes for 64. Ours holds inputs 2 i and 2 i + 1. Two bytes are read as
    one number, so that neighbours come together by one shift.
    """
    run = 16 if quants.shape[1] == 16 else 32
    pairs = np.ascontiguousarray(quants).view("<u2").reshape(len(quants), -1, run // 2)
    result = np.empty((*pairs.shape[:2], 2, run // 2), np.uint8)
    for which, halves in enumerate((pairs & 0x0F0F, pairs >> 4 & 0x0F0F)):
        result[:, :, which] = halves | halves >> 4  # casting to uint8 drops the upper byte
    return result.reshape(quants.shape)


# Bytes of a block, and the function that unpacks it.
_KINDS: dict[str, tuple[int, Callable[[np.ndarray], _Unpacked]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q4_K": (144, _q4_k),
}

"""The tensors of GGUF files -> arrays: what types there are, where their bytes lie, and several of them as one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.checkpoint.checksums import changed, crc32
from phi3_jax.checkpoint.gguf.blocks import IntegerRows, fuse, fused_form, unpack
from phi3_jax.checkpoint.gguf.header import GgufTensor, damaged, read_header
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_TRAILER = b"phi3_jax's CRC32"


@functools.cache
def tensor_kinds() -> dict[int, tuple[str, int, int]]:
    """Tensor types by number -> (name, values per block, bytes per block): floats, and what gguf dequantises.

    Raises ImportError if the extra `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'phi3_jax[gguf]'") from None

    def is_readable(kind: Any) -> bool:
        try:
            gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES and (kind.name in _PLAIN or is_readable(kind))
    }


def unsupported_kinds(table: Mapping[str, GgufTensor]) -> dict[str, str]:
    """The names of types that cannot be read, by tensor."""
    import gguf

    known = set(gguf.GGMLQuantizationType)
    return {
        name: gguf.GGMLQuantizationType(tensor.kind).name if tensor.kind in known else f"number {tensor.kind}"
        for name, tensor in table.items()
        if tensor.kind not in tensor_kinds()
    }


def checked(table: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """The table with its tensors' checksums, where the file is ours.

    As llama.cpp demands it, each tensor begins where the one before it in the table ends, after the padding to the
    alignment; here nothing but our checksums may follow the last one.

    Raises:
      ValueError: that is not so, a tensor is not made of whole blocks, or the header is not what was written.
    """
    found: dict[str, GgufTensor] = {}
    for path in {tensor.path: None for tensor in table.values()}:
        ours = {name: tensor for name, tensor in table.items() if tensor.path == path}
        end = _end(path, ours)
        sums = _checksums(path, len(ours), end, next(iter(ours.values())))
        found |= {
            name: dataclasses.replace(each, crc=crc) for (name, each), crc in zip(ours.items(), sums, strict=True)
        }
    return found


def checksum_trailer(path: Path, tensors: list[int]) -> bytes:
    """What is appended to a GGUF file that is otherwise complete: checksums of its header and of its tensors.

    They stand behind the tensors, and not among the keys: other programs do not read on behind the last tensor, and
    when they make another file of this one, they copy its keys, but no checksums that would then be wrong.

    Args:
      tensors: the `crc32` of each tensor's bytes, in the order of the table.
    """
    start = next(iter(read_header(path)[1].values())).start
    return _TRAILER + np.array([_header_crc(path, start), *tensors], "<u4").tobytes()


def _end(path: Path, table: Mapping[str, GgufTensor]) -> int:
    """The byte behind the last of a file's tensors, the padding left out."""
    size, end, expected = path.stat().st_size, 0, None
    for name, tensor in table.items():
        kind, block, block_bytes = tensor_kinds()[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise damaged(path, f"{name} {list(tensor.shape)} is not made of whole {kind} blocks of {block}")
        expected = tensor.start if expected is None else expected
        if tensor.offset != expected:
            raise damaged(path, f"{name} begins at byte {tensor.offset}, and the tensor before it ends at {expected}")
        end = tensor.offset + math.prod(tensor.shape) // block * block_bytes
        if end > size:
            raise damaged(path, f"{name} ends beyond byte {size}, the end of the file")
        expected = end + -(end - tensor.start) % tensor.alignment
    return end


def _checksums(path: Path, count: int, end: int, first: GgufTensor) -> list[int] | list[None]:
    """The checksums behind a file's last tensor, which ends at byte `end`; None for each where there are none."""
    padded = end + -(end - first.start) % first.alignment
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(padded - end + len(_TRAILER) + 4 * (count + 1) + 1)
    trailer = rest[padded - end :]
    if not trailer:
        return [None] * count
    sums = np.frombuffer(trailer[len(_TRAILER) :][: 4 * (count + 1)], np.uint8)
    if not trailer.startswith(_TRAILER) or len(trailer) != len(_TRAILER) + 4 * (count + 1):
        raise damaged(path, f"its tensors end at byte {padded} of {path.stat().st_size}")
    header, *tensors = sums.view("<u4").tolist()
    if header != _header_crc(path, first.start):
        raise changed(path, "its header", f"cut the file off at byte {padded}, behind its tensors")
    return tensors


def _header_crc(path: Path, start: int) -> int:
    with path.open("rb") as file:
        return crc32(np.frombuffer(file.read(start), np.uint8))


def fused_source(parts: list[str], table: Mapping[str, GgufTensor], config: Phi3Config, permuted: bool) -> TensorSource:
    """One tensor, of the rows of all parts in their order.

    Args:
      permuted: the rows of q and k are in the order of interleaved rotary pairs.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rows = {name: count * config.head_dim for name, count in heads.items()} | {
        "attn_v": config.num_key_value_heads * config.head_dim,
        "ffn_gate": config.intermediate_size,
        "ffn_up": config.intermediate_size,
    }
    stems = [part.split(".")[-2] for part in parts]
    shapes, width = [table[part].shape for part in parts], table[parts[0]].shape[1:]
    if len(parts) > 1 and shapes != [(rows[stem], *width) for stem in stems]:
        some = [list(shape) for shape in shapes]
        raise damaged(table[parts[0]].path, f"{parts} of shapes {some} do not fit the configuration")
    dtypes = {_dtype(table[part]) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    kinds = [tensor_kinds()[table[part].kind][0] for part in parts]
    form = fused_form(kinds)

    def ordered(array: np.ndarray, stem: str) -> np.ndarray:
        return _half_split(array, heads[stem]) if permuted and stem in heads else array

    def read() -> np.ndarray:
        arrays = [
            ordered(read_tensor(table[part]).astype(dtype, copy=False), stem)
            for part, stem in zip(parts, stems, strict=True)
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def quantized() -> IntegerRows | None:
        if form is None:
            return None
        found = []
        for part, stem, kind in zip(parts, stems, kinds, strict=True):
            rows = unpack(kind, _raw_blocks(table[part]))
            found.append(rows and rows.each(functools.partial(ordered, stem=stem)))
        return fuse(found)

    return TensorSource((sum(shape[0] for shape in shapes), *width), dtype.name, read, form, quantized)


def read_tensor(tensor: GgufTensor) -> np.ndarray:
    """One tensor as float32, or as the 16-bit type that it has."""
    name = tensor_kinds()[tensor.kind][0]
    if name in _PLAIN:
        return _mapped(tensor, _PLAIN[name], tensor.shape)
    return _dequantiser()(_raw_blocks(tensor), tensor.kind)


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of interleaved rotary pairs (0, 1), (2, 3), ... -> pairs (0, d/2), (1, d/2 + 1), ..."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _dtype(tensor: GgufTensor) -> np.dtype:
    return _PLAIN.get(tensor_kinds()[tensor.kind][0], np.dtype(np.float32))


def _raw_blocks(tensor: GgufTensor) -> np.ndarray:
    """A quantised tensor's bytes, row by row."""
    _, block, block_bytes = tensor_kinds()[tensor.kind]
    *rows, width = tensor.shape
    return _mapped(tensor, np.dtype(np.uint8), (*rows, width // block * block_bytes))


def _mapped(tensor: GgufTensor, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.memmap(tensor.path, dtype, "r", tensor.offset, shape)
    if tensor.crc is not None and crc32(array) != tensor.crc:
        raise changed(tensor.path, f"the tensor at byte {tensor.offset}", "cut the file off behind its tensors")
    return array


@functools.cache
def _dequantiser() -> Callable[[np.ndarray, int], np.ndarray]:
    import gguf

    return lambda raw, kind: gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))

"""GGUF files -> configuration, tensors and tokenizer of a Phi-3 model.

Quantised tensors are read as floats, or as the file's own integers (blocks.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.checkpoint.gguf.blocks import IntegerRows, fuse, fused_form, unpack
from phi3_jax.checkpoint.gguf.header import GgufTensor, damaged, read_header
from phi3_jax.checkpoint.gguf.tokenizer_reader import tokenizer_from_gguf
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import LongRope, Phi3Config
from phi3_jax.text import Tokenizer, end_ids

_Kind = type | list[type]  # [str] is an array of strings

_ARCHITECTURES = ("phi3", "llama")
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The tensors of a layer: Hugging Face's name -> the file's, after "blk.{i}."; several parts are fused in this order.
_LAYER_PARTS = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "self_attn.o_proj.weight": ("attn_output.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
    "mlp.down_proj.weight": ("ffn_down.weight",),
    "self_attn.qkv_proj.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "mlp.gate_up_proj.weight": ("ffn_gate.weight", "ffn_up.weight"),
}
# phi3 files hold these two already fused.
_FUSED_PARTS = {"self_attn.qkv_proj.weight": "attn_qkv.weight", "mlp.gate_up_proj.weight": "ffn_up.weight"}
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Keys of the architecture that are read here, and their types; others are refused: they could change the numbers.
_REQUIRED_KEYS: dict[str, _Kind] = {
    "attention.head_count": int,
    "attention.layer_norm_rms_epsilon": float,
    "block_count": int,
    "context_length": int,
    "embedding_length": int,
    "feed_forward_length": int,
}
_OPTIONAL_KEYS: dict[str, _Kind] = {
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "attention.sliding_window": int,
    "attention.value_length": int,
    "rope.dimension_count": int,
    "rope.freq_base": float,
    "rope.scaling.attn_factor": float,
    "rope.scaling.original_context_length": int,
    "rope.scaling.type": str,
    "vocab_size": int,
}
# Says how a model was trained, not what it computes.
_INERT_KEYS = frozenset({"rope.scaling.finetuned"})
# Converters write these values, which have no effect; other values are not implemented.
_FIXED_KEYS = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}
# Keys of every architecture. A damaged byte can turn a number into text, so types are checked before keys are used.
_FILE_KEYS: dict[str, _Kind] = {
    "general.architecture": str,
    "split.count": int,
    "tokenizer.chat_template": str,
    "tokenizer.chat_template.tool_use": str,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
    "tokenizer.ggml.merges": [str],
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.scores": [float],
    "tokenizer.ggml.token_type": [int],
    "tokenizer.ggml.tokens": [str],
    **{f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}
_NO_TOKENIZER = ("no_vocab", "none")
# A GGUF file often names one or two end ids, but chat models have more: these tokens end a turn in all of them.


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file, its tensors not yet read.

    Attributes:
      tensors: by Hugging Face name, as `assemble` takes them.
      tokenizer: None where the file has none.
      eos_token_ids: every id that ends an answer.
    """

    config: Phi3Config
    tensors: dict[str, TensorSource]
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file of architecture phi3 or llama.

    Raises:
      ImportError: the extra `gguf` is not installed.
      ValueError: the file is damaged, or is of a model that this decoder does not compute.
    """
    kinds = _tensor_kinds()
    metadata, table = read_header(path)
    if wrong := _wrong_types(metadata, _FILE_KEYS):
        raise damaged(path, "; ".join(wrong))
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} cannot be loaded, only {_ARCHITECTURES}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path}: one of {metadata['split.count']} parts; merge them into one GGUF file first")
    keys = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    parts = _parts(keys.get("block_count"), architecture, table)
    if problems := [*_key_problems(keys, architecture, table), *_tensor_problems(parts, table, kinds)]:
        raise ValueError(f"{path}: not a model that can be loaded: {'; '.join(problems)}")
    _check_extents(path, table, kinds)
    config = _config(path, metadata, keys, table)
    has_tokenizer = metadata.get("tokenizer.ggml.model", "no_vocab") not in _NO_TOKENIZER
    tokenizer = tokenizer_from_gguf(metadata, str(path)) if has_tokenizer else None
    rows = {"vocab_size": keys.get("vocab_size"), "tokens": tokenizer.vocab_size if tokenizer else None}
    if unequal := {name: count for name, count in rows.items() if count not in (None, config.vocab_size)}:
        raise damaged(path, f"{unequal} but an embedding of {config.vocab_size} rows")
    sources = {
        name: _source(path, names, table, config, permuted=architecture == "llama") for name, names in parts.items()
    }
    return GgufFile(config, sources, tokenizer, _end_ids(path, metadata, tokenizer, config.vocab_size))


@functools.cache
def _tensor_kinds() -> dict[int, tuple[str, int, int]]:
    """Tensor types by number -> (name, values per block, bytes per block): floats, and what gguf dequantises."""
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


def _wrong_types(values: Mapping[str, Any], kinds: Mapping[str, _Kind], prefix: str = "") -> list[str]:
    def fits(value: Any, kind: _Kind) -> bool:
        if isinstance(kind, list):
            return isinstance(value, list) and all(fits(first, kind[0]) for first in value[:1])  # arrays have one type
        return type(value) is kind or (kind is float and type(value) is int)

    def spelled(kind: _Kind) -> str:
        return f"array of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__

    return [
        f"{prefix}{key} is {str(values[key])[:40]}, not of type {spelled(kind)}"
        for key, kind in kinds.items()
        if key in values and not fits(values[key], kind)
    ]


def _key_problems(keys: Mapping[str, Any], architecture: str, table: Mapping[str, GgufTensor]) -> list[str]:
    """Why the architecture's keys do not describe this decoder, one phrase for each reason."""
    prefix, known = f"{architecture}.", _REQUIRED_KEYS | _OPTIONAL_KEYS
    changed = {key for key in keys.keys() - known.keys() - _INERT_KEYS if keys[key] != _FIXED_KEYS.get(key)}
    found = []
    if changed:
        found.append(f"unsupported keys {sorted(prefix + key for key in changed)}, which may change the numbers")
    found += [f"the key {prefix}{key} is missing" for key in _REQUIRED_KEYS if key not in keys]
    if wrong := _wrong_types(keys, known, prefix):
        differ = any(isinstance(keys.get(key), list) for key in known)
        return found + wrong + ["layers that differ are not supported"] * differ
    for key, kind in known.items():
        if kind is int and key != "attention.sliding_window" and keys.get(key, 1) < 1:
            found.append(f"{prefix}{key} is {keys[key]}, not a positive number")
    if keys.get("block_count", 0) > len(table):
        found.append(f"{len(table)} tensors cannot be those of {keys['block_count']} layers")
    factors = [name for name in (_SHORT_FACTORS, _LONG_FACTORS) if name in table]
    scaling, original = keys.get("rope.scaling.type"), keys.get("rope.scaling.original_context_length")
    if scaling not in (None, "none", "longrope") or (scaling == "none" and factors):
        found.append(f"{prefix}rope.scaling.type is {scaling!r}, only LongRoPE with its factors is supported")
    if factors and (len(factors) < 2 or original is None):
        found.append("LongRoPE needs both factor tensors and rope.scaling.original_context_length")
    # Some converters lose the factors of a LongRoPE checkpoint: what remains is another model.
    extended = original is not None and original < keys.get("context_length", 0)
    if not factors and (extended or scaling == "longrope" or keys.get("rope.scaling.attn_factor", 1.0) != 1.0):
        found.append("the keys speak of LongRoPE but the tensors of its factors are missing; convert the model again")
    if not found:
        found += _head_problems(keys, architecture)
    return found


def _head_problems(keys: Mapping[str, Any], architecture: str) -> list[str]:
    heads, width = keys["attention.head_count"], keys["embedding_length"]
    if "attention.key_length" not in keys and width % heads:
        return [f"embedding_length {width} is not a multiple of attention.head_count {heads}"]
    head_dim = keys.get("attention.key_length", width // heads)
    if keys.get("attention.value_length", head_dim) != head_dim:
        return [f"keys of {head_dim} and values of {keys['attention.value_length']} are not supported"]
    if architecture == "llama" and keys.get("rope.dimension_count", head_dim) != head_dim:
        # How the rows beyond the rotated ones would be ordered is not defined.
        return [f"llama.rope.dimension_count must be the size of a head, {head_dim}"]
    return []


def _tensor_problems(
    parts: Mapping[str, list[str]], table: Mapping[str, GgufTensor], kinds: Mapping[int, tuple[str, int, int]]
) -> list[str]:
    found = []
    used = {_LONG_FACTORS, _SHORT_FACTORS, *(name for names in parts.values() for name in names)}
    if unknown := sorted(table.keys() - used):
        found.append(f"tensors that a Phi-3 decoder does not have: {unknown[:8]} ({len(unknown)} in all)")
    if unsupported := {name: tensor.kind for name, tensor in table.items() if tensor.kind not in kinds}:
        some = {name: _kind_name(kind) for name, kind in list(unsupported.items())[:8]}
        found.append(
            f"tensors of unsupported types {some} ({len(unsupported)} in all): convert it, for example to Q8_0"
        )
    if len(table.get("token_embd.weight", GgufTensor((), 0, 0)).shape) != 2:
        found.append("there is no matrix token_embd.weight")
    return found


def _kind_name(kind: int) -> str:
    import gguf

    return gguf.GGMLQuantizationType(kind).name if kind in set(gguf.GGMLQuantizationType) else f"number {kind}"


def _check_extents(path: Path, table: Mapping[str, GgufTensor], kinds: Mapping[int, tuple[str, int, int]]) -> None:
    size = path.stat().st_size
    for name, tensor in table.items():
        kind, block, block_bytes = kinds[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise damaged(path, f"{name} {list(tensor.shape)} is not made of whole {kind} blocks of {block}")
        if tensor.offset + math.prod(tensor.shape) // block * block_bytes > size:
            raise damaged(path, f"{name} ends beyond byte {size}, the end of the file")


def _config(
    path: Path, metadata: Mapping[str, Any], keys: Mapping[str, Any], table: Mapping[str, GgufTensor]
) -> Phi3Config:
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // heads)
    try:
        return Phi3Config(
            vocab_size=table["token_embd.weight"].shape[0],
            hidden_size=keys["embedding_length"],
            intermediate_size=keys["feed_forward_length"],
            num_hidden_layers=keys["block_count"],
            num_attention_heads=heads,
            num_key_value_heads=keys.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=keys["context_length"],
            rope_theta=keys.get("rope.freq_base", 10000.0),  # what llama.cpp takes where a file does not say
            rms_norm_eps=_shortest(keys["attention.layer_norm_rms_epsilon"]),
            partial_rotary_factor=_share(keys.get("rope.dimension_count", head_dim), head_dim),
            long_rope=_long_rope(path, keys, table),
            sliding_window=keys.get("attention.sliding_window", 0) or None,
            tie_word_embeddings="output.weight" not in table,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=tuple(metadata[k] for k in ("tokenizer.ggml.eos_token_id",) if k in metadata),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shortest(number: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-5 instead of 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _share(rotary_dim: int, head_dim: int) -> float:
    """The fraction for which `Phi3Config.rotary_dim` is this number; it rounds down, and 44 * (30 / 44) is below 30."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _long_rope(path: Path, keys: Mapping[str, Any], table: Mapping[str, GgufTensor]) -> LongRope | None:
    if _SHORT_FACTORS not in table:
        return None
    short, long = (
        tuple(_shortest(value) for value in _read_tensor(path, table[name]).ravel())
        for name in (_SHORT_FACTORS, _LONG_FACTORS)
    )
    factor = keys.get("rope.scaling.attn_factor")
    attention_factor = None if factor is None else _shortest(factor)
    return LongRope(short, long, keys["rope.scaling.original_context_length"], attention_factor=attention_factor)


def _parts(layers: Any, architecture: str, table: Mapping[str, GgufTensor]) -> dict[str, list[str]]:
    """Hugging Face's names -> the file's tensors to be fused into one; `assemble` reports what is missing."""
    found = {name: [part] for part, name in _NAMES.items() if part in table}
    # A damaged count can be very large, but there are not more layers than tensors.
    for i in range(min(layers, len(table)) if type(layers) is int else 0):
        for name, parts in _LAYER_PARTS.items():
            options = [[f"blk.{i}.{part}" for part in parts]]
            if architecture == "phi3" and name in _FUSED_PARTS:  # the row order of a fused llama is not defined
                options.append([f"blk.{i}.{_FUSED_PARTS[name]}"])
            for option in options:
                if all(part in table for part in option):
                    found.setdefault(f"model.layers.{i}.{name}", option)
    return found


def _source(
    path: Path, parts: list[str], table: Mapping[str, GgufTensor], config: Phi3Config, permuted: bool
) -> TensorSource:
    """One tensor, of the rows of all parts in their order."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rows = {name: count * config.head_dim for name, count in heads.items()} | {
        "attn_v": config.num_key_value_heads * config.head_dim,
        "ffn_gate": config.intermediate_size,
        "ffn_up": config.intermediate_size,
    }
    stems = [part.split(".")[-2] for part in parts]
    shapes, width = [table[part].shape for part in parts], table[parts[0]].shape[1:]
    if len(parts) > 1 and shapes != [(rows[stem], *width) for stem in stems]:
        raise damaged(path, f"{parts} of shapes {[list(shape) for shape in shapes]} do not fit the configuration")
    dtypes = {_dtype(table[part]) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    kinds = [_tensor_kinds()[table[part].kind][0] for part in parts]
    form = fused_form(kinds)

    def ordered(array: np.ndarray, stem: str) -> np.ndarray:
        return _half_split(array, heads[stem]) if permuted and stem in heads else array

    def read() -> np.ndarray:
        arrays = [
            ordered(_read_tensor(path, table[part]).astype(dtype, copy=False), stem)
            for part, stem in zip(parts, stems, strict=True)
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def quantized() -> IntegerRows | None:
        if form is None:
            return None
        found = []
        for part, stem, kind in zip(parts, stems, kinds, strict=True):
            rows = unpack(kind, _raw_blocks(path, table[part]))
            found.append(rows and rows.each(functools.partial(ordered, stem=stem)))
        return fuse(found)

    return TensorSource((sum(shape[0] for shape in shapes), *width), dtype.name, read, form, quantized)


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of interleaved rotary pairs (0, 1), (2, 3), ... -> pairs (0, d/2), (1, d/2 + 1), ..."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _dtype(tensor: GgufTensor) -> np.dtype:
    return _PLAIN.get(_tensor_kinds()[tensor.kind][0], np.dtype(np.float32))


def _read_tensor(path: Path, tensor: GgufTensor) -> np.ndarray:
    """One tensor as float32, or as the 16-bit type that it has."""
    name = _tensor_kinds()[tensor.kind][0]
    if name in _PLAIN:
        return np.memmap(path, _PLAIN[name], "r", tensor.offset, tensor.shape)
    return _dequantiser()(_raw_blocks(path, tensor), tensor.kind)


def _raw_blocks(path: Path, tensor: GgufTensor) -> np.ndarray:
    """A quantised tensor's bytes, row by row."""
    _, block, block_bytes = _tensor_kinds()[tensor.kind]
    *rows, width = tensor.shape
    return np.memmap(path, np.uint8, "r", tensor.offset, (*rows, width // block * block_bytes))


@functools.cache
def _dequantiser() -> Callable[[np.ndarray, int], np.ndarray]:
    import gguf

    return lambda raw, kind: gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))


def _end_ids(path: Path, metadata: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = sorted(end_ids([token_id for token_id in named if token_id is not None], tokenizer))
    if any(not 0 <= token_id < vocab_size for token_id in ids):
        raise damaged(path, f"ids {ids} that end a text, but an embedding of {vocab_size} rows")
    return tuple(ids)

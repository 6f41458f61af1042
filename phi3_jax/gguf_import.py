"""GGUF files -> configuration, tensors and tokenizer of a Phi-3 model. Quantised tensors become floats when read."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.config import LongRope, Phi3Config
from phi3_jax.gguf_header import GgufTensor, damaged, read_header
from phi3_jax.tokenizer import Tokenizer
from phi3_jax.tokenizer_gguf import tokenizer_from_gguf
from phi3_jax.weights import TensorSource

_ARCHITECTURES = ("phi3", "llama")
_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What one layer has, under the names after "blk.{i}."; several parts are fused in this order.
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
# Keys of the architecture that are read here; any other one could change the numbers.
_KNOWN_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "vocab_size",
    }
)
# A GGUF file has room for one or two end ids, but chat models have more: these texts end a turn in all of them.
_END_TEXTS = ("<|end|>", "<|endoftext|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file, its tensors not yet read.

    Attributes:
      tensors: by Hugging Face name, as `weights.assemble` wants them.
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
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} cannot be loaded, only {_ARCHITECTURES}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path}: one of {metadata['split.count']} parts; merge them into one GGUF file first")
    _check_extents(path, table, kinds)
    config = _config(path, metadata, table)
    tokenizer = tokenizer_from_gguf(metadata, str(path)) if "tokenizer.ggml.model" in metadata else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise damaged(path, f"{tokenizer.vocab_size} tokens but an embedding of {config.vocab_size} rows")
    return GgufFile(config, _tensors(path, config, architecture, table), tokenizer, _end_ids(metadata, tokenizer))


def _tensor_kinds() -> dict[int, tuple[str, int, int]]:
    """Supported tensor types by number -> (name, values per block, bytes per block)."""
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'phi3_jax[gguf]'") from None
    kinds = {name: gguf.GGMLQuantizationType[name] for name in _KINDS}
    return {int(kind): (name, *gguf.GGML_QUANT_SIZES[kind]) for name, kind in kinds.items()}


def _check_extents(path: Path, table: dict[str, GgufTensor], kinds: dict[int, tuple[str, int, int]]) -> None:
    unsupported = {name: tensor.kind for name, tensor in table.items() if tensor.kind not in kinds}
    if unsupported:
        some = dict(list(unsupported.items())[:5])
        raise ValueError(f"{path}: tensors of unsupported types (by number) {some}; supported are {', '.join(_KINDS)}")
    size = path.stat().st_size
    for name, tensor in table.items():
        kind, block, block_bytes = kinds[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise damaged(path, f"{name} {list(tensor.shape)} is not made of whole {kind} blocks of {block}")
        if tensor.offset + math.prod(tensor.shape) // block * block_bytes > size:
            raise damaged(path, f"{name} ends beyond byte {size}, the end of the file")


def _config(path: Path, metadata: dict[str, Any], table: dict[str, GgufTensor]) -> Phi3Config:
    prefix = f"{metadata['general.architecture']}."
    keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    # Written by converters where they do nothing: no scaling, all tokens attend causally.
    if keys.get("rope.scaling.type") in ("none", "longrope"):
        del keys["rope.scaling.type"]
    if unknown := sorted(keys.keys() - _KNOWN_KEYS):
        raise ValueError(f"{path}: unsupported keys {[prefix + key for key in unknown]}; they may change the numbers")

    def need(key: str) -> Any:
        if key not in keys:
            raise ValueError(f"{path}: the key {prefix}{key} is missing; convert the model to GGUF again")
        return keys[key]

    if "token_embd.weight" not in table or len(table["token_embd.weight"].shape) != 2:
        raise damaged(path, "there is no matrix token_embd.weight")
    heads, width = need("attention.head_count"), need("embedding_length")
    if not (type(heads) is int and type(width) is int and heads > 0):
        raise ValueError(f"{path}: {prefix}attention.head_count is {heads!r}: layers that differ are not supported")
    head_dim = keys.get("attention.key_length", width // heads)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{path}: keys of {head_dim} and values of {keys['attention.value_length']} are not supported")
    try:
        return Phi3Config(
            vocab_size=table["token_embd.weight"].shape[0],
            hidden_size=width,
            intermediate_size=need("feed_forward_length"),
            num_hidden_layers=need("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=keys.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=need("context_length"),
            rope_theta=need("rope.freq_base"),
            rms_norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
            partial_rotary_factor=keys.get("rope.dimension_count", head_dim) / head_dim,
            long_rope=_long_rope(path, keys, table),
            sliding_window=keys.get("attention.sliding_window", 0) or None,
            tie_word_embeddings="output.weight" not in table,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=tuple(metadata[k] for k in ("tokenizer.ggml.eos_token_id",) if k in metadata),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _shortest(number: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-5 instead of 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _long_rope(path: Path, keys: dict[str, Any], table: dict[str, GgufTensor]) -> LongRope | None:
    factor = keys.get("rope.scaling.attn_factor")
    present = [name for name in (_SHORT_FACTORS, _LONG_FACTORS) if name in table]
    if not present:
        if factor not in (None, 1.0):
            raise ValueError(f"{path}: rope.scaling.attn_factor={factor} without the tensors of LongRoPE's factors")
        return None
    if len(present) == 1 or "rope.scaling.original_context_length" not in keys:
        raise damaged(path, "LongRoPE needs both factor tensors and rope.scaling.original_context_length")
    short, long = (
        tuple(_shortest(value) for value in _read_tensor(path, table[name]).ravel())
        for name in (_SHORT_FACTORS, _LONG_FACTORS)
    )
    attention_factor = None if factor is None else _shortest(factor)
    return LongRope(short, long, keys["rope.scaling.original_context_length"], attention_factor=attention_factor)


def _tensors(
    path: Path, config: Phi3Config, architecture: str, table: dict[str, GgufTensor]
) -> dict[str, TensorSource]:
    """The tensors under Hugging Face names; raises ValueError for tensors that belong to no name."""
    used = {_LONG_FACTORS, _SHORT_FACTORS}
    sources = {}

    def add(name: str, parts: list[str]) -> None:
        used.update(parts)
        sources[name] = _source(path, parts, table, config, permuted=architecture == "llama")

    for gguf_name, name in _NAMES.items():
        if gguf_name in table:
            add(name, [gguf_name])
    if config.num_hidden_layers > len(table):
        raise damaged(path, f"{len(table)} tensors cannot be those of {config.num_hidden_layers} layers")
    for i in range(config.num_hidden_layers):
        for name, parts in _LAYER_PARTS.items():
            split = [f"blk.{i}.{part}" for part in parts]
            fused = [f"blk.{i}.{_FUSED_PARTS[name]}"] if name in _FUSED_PARTS else split
            present = next((option for option in (split, fused) if all(part in table for part in option)), None)
            if present is not None:  # what is missing is reported by weights.assemble, with all the rest
                add(f"model.layers.{i}.{name}", present)
    if unknown := sorted(table.keys() - used):
        raise ValueError(f"{path}: tensors that a Phi-3 decoder does not have: {unknown[:8]} ({len(unknown)} in all)")
    return sources


def _source(
    path: Path, parts: list[str], table: dict[str, GgufTensor], config: Phi3Config, permuted: bool
) -> TensorSource:
    shapes = [table[part].shape for part in parts]
    if any(len(shape) != len(shapes[0]) or shape[1:] != shapes[0][1:] for shape in shapes):
        raise damaged(path, f"{parts} of shapes {[list(shape) for shape in shapes]} do not fit one another")

    def read() -> np.ndarray:
        arrays = []
        for part in parts:
            array = _read_tensor(path, table[part])
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if permuted and (kind := part.split(".")[-2]) in heads:
                array = _half_split(array, heads[kind])
            arrays.append(array)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return TensorSource((sum(shape[0] for shape in shapes), *shapes[0][1:]), "float32", read)


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of interleaved rotary pairs (0, 1), (2, 3), ... -> pairs (0, d/2), (1, d/2 + 1), ..."""
    if weight.shape[0] % (2 * heads):
        raise ValueError(f"{weight.shape[0]} rows cannot be those of {heads} heads")
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _read_tensor(path: Path, tensor: GgufTensor) -> np.ndarray:
    """One tensor as float32, or as the 16-bit type that it has."""
    name, block, block_bytes = _tensor_kinds()[tensor.kind]
    if name in _PLAIN:
        return np.memmap(path, _PLAIN[name], "r", tensor.offset, tensor.shape)
    *rows, width = tensor.shape
    raw = np.memmap(path, np.uint8, "r", tensor.offset, (*rows, width // block * block_bytes))
    return _dequantiser()(raw, tensor.kind)


@functools.cache
def _dequantiser() -> Callable[[np.ndarray, int], np.ndarray]:
    import gguf

    return lambda raw, kind: gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))


def _end_ids(metadata: dict[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [t.id for t in tokenizer.added_tokens if t.content in _END_TEXTS] if tokenizer else []
    return tuple(sorted({token_id for token_id in [*named, *known] if token_id is not None}))

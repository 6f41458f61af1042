"""GGUF files -> configuration, tensors and tokenizer of a Phi-3 model.

Quantised tensors are read as floats, or as the file's own integers (blocks.py).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.checkpoint.gguf.header import GgufTensor, damaged
from phi3_jax.checkpoint.gguf.parts import named_as_part, read_headers
from phi3_jax.checkpoint.gguf.tensors import checked, fused_source, read_tensor, tensor_kinds, unsupported_kinds
from phi3_jax.checkpoint.gguf.tokenizer_reader import tokenizer_from_gguf
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import LongRope, Phi3Config
from phi3_jax.json_files import shown
from phi3_jax.text import Tokenizer, end_ids

_Kind = type | list[type]  # [str] is an array of strings

_ARCHITECTURES = ("phi3", "llama")
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
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's: divisors of the frequencies at every length
# Keys of the architecture that are read here, and their types; others are refused: they could change the numbers.
# Required is what llama.cpp requires, and what it cannot do without.
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
    "rope.scale_linear": float,
    "rope.scaling.attn_factor": float,
    "rope.scaling.factor": float,
    "rope.scaling.original_context_length": int,
    "rope.scaling.type": str,
    "vocab_size": int,
}
# One number, or one for each layer.
_LAYER_KEYS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
# They say how a model was trained or made, or are not read for these architectures.
_INERT_KEYS = frozenset({"attention.layer_norm_epsilon", "rope.scaling.finetuned", "tensor_data_layout"})
# Converters write these values, which have no effect; other values are not implemented.
_FIXED_KEYS = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}
# Keys of every architecture. A damaged byte can turn a number into text, so types are checked before keys are used.
_FILE_KEYS: dict[str, _Kind] = {
    "general.architecture": str,
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
# What llama.cpp takes for a vocabulary of sentencepiece where a file does not say.
_DEFAULT_IDS = {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))}
_NO_TOKENIZER = ("no_vocab", "none")


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
    """Opens a GGUF file of architecture phi3 or llama, or all parts of one of which any is named.

    Warns:
      UserWarning: what is loaded is not what a reader would expect of the file's name or keys.

    Raises:
      FileNotFoundError: parts are missing.
      ImportError: the extra `gguf` is not installed.
      ValueError: the file is damaged, or is of a model that this decoder does not compute.
    """
    tensor_kinds()  # without the package, this says so before anything is read
    metadata, table = read_headers(path)
    if metadata.get("tokenizer.ggml.model") == "llama":
        metadata = _DEFAULT_IDS | metadata
    if wrong := _wrong_types(metadata, _FILE_KEYS):
        raise damaged(path, "; ".join(wrong))
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{path}: architecture {shown(architecture)} cannot be loaded, only {_ARCHITECTURES}")
    keys = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    keys = _one_for_all_layers(keys)
    metadata = _known_ids(path, metadata, table)
    parts = _parts(keys.get("block_count"), architecture, table)
    if "split.count" not in metadata:
        _check_name(path, keys, parts)
    if problems := [*_key_problems(keys, architecture, table), *_tensor_problems(parts, table)]:
        raise ValueError(f"{path}: not a model that can be loaded: {'; '.join(problems)}")
    table = checked(table)
    config = _config(path, metadata, keys, table)
    has_tokenizer = metadata.get("tokenizer.ggml.model", "no_vocab") not in _NO_TOKENIZER
    tokenizer = tokenizer_from_gguf(metadata, str(path)) if has_tokenizer else None
    # As in llama.cpp, the key counts only where there are no tokens to be counted.
    what, rows = ("tokens", tokenizer.vocab_size) if tokenizer else ("vocab_size", keys.get("vocab_size"))
    if rows not in (None, config.vocab_size):
        raise damaged(path, f"{ {what: rows} } but an embedding of {config.vocab_size} rows")
    sources = {name: fused_source(names, table, config, architecture == "llama") for name, names in parts.items()}
    return GgufFile(config, sources, tokenizer, _end_ids(path, metadata, tokenizer, config.vocab_size))


def _known_ids(path: Path, metadata: Mapping[str, Any], table: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The metadata without the ids of tokens that the vocabulary does not have; converters write -1 for none."""
    tokens, embedding = metadata.get("tokenizer.ggml.tokens"), table.get("token_embd.weight")
    rows = len(tokens) if tokens else embedding.shape[0] if embedding else None
    known = dict(metadata)
    for key, value in metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and rows and not 0 <= value < rows:
            warnings.warn(
                f"{path}: {key} is {value}, and there are {rows} tokens: left out, as by llama.cpp", stacklevel=4
            )
            del known[key]
    return known


def _one_for_all_layers(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, with one number where a list has it for each layer."""
    result = dict(keys)
    for key in _LAYER_KEYS:
        value = keys.get(key)
        if isinstance(value, list) and len(value) == keys.get("block_count") and value == value[:1] * len(value):
            result[key] = value[0]
    return result


def _check_name(path: Path, keys: Mapping[str, Any], parts: Mapping[str, list[str]]) -> None:
    """For a file that is no part of another by its header: whether its name says otherwise."""
    if (part := named_as_part(path)) is None:
        return
    layers = keys.get("block_count")
    count = len(parts) - ("lm_head.weight" in parts)
    if type(layers) is not int or count != 2 + len(_LAYER_PARTS) * layers:
        raise ValueError(
            f"{path}: {part}, by its name, but its header does not say so: another program than gguf-split has cut it; "
            "join the pieces as that program does, or download the whole file"
        )
    warnings.warn(f"{path}: {part}, by its name, but it holds a whole model: other parts are not read", stacklevel=4)


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
    if scaling not in (None, "none", "linear", "longrope"):
        found.append(f"{prefix}rope.scaling.type is {shown(scaling)}, only none, linear and longrope are supported")
    if len(factors) == 1:
        found.append(f"LongRoPE needs both factor tensors, and only {factors[0]} is there")
    # Some converters lose the factors of a LongRoPE checkpoint: what remains is another model.
    extended = original is not None and original < keys.get("context_length", 0)
    divided = _ROPE_FACTORS in table or _linear_factor(keys) != 1
    if factors and divided:
        found.append("LongRoPE's factors and others, or rope.scaling.factor, are both given: only one is supported")
    if not factors and (
        (extended and not divided) or scaling == "longrope" or keys.get("rope.scaling.attn_factor", 1.0) != 1.0
    ):
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


def _tensor_problems(parts: Mapping[str, list[str]], table: Mapping[str, GgufTensor]) -> list[str]:
    found = []
    used = {_LONG_FACTORS, _SHORT_FACTORS, _ROPE_FACTORS, *(name for names in parts.values() for name in names)}
    if unknown := sorted(table.keys() - used):
        found.append(f"tensors that a Phi-3 decoder does not have: {unknown[:8]} ({len(unknown)} in all)")
    if unsupported := unsupported_kinds(table):
        some = dict(list(unsupported.items())[:8])
        found.append(
            f"tensors of unsupported types {some} ({len(unsupported)} in all): convert it, for example to Q8_0"
        )
    if "token_embd.weight" not in table or len(table["token_embd.weight"].shape) != 2:
        found.append("there is no matrix token_embd.weight")
    return found


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


def _linear_factor(keys: Mapping[str, Any]) -> float:
    """What all frequencies are divided by; 0 and 1 mean the same, and the second name is an old one."""
    if keys.get("rope.scaling.type") == "none":
        return 1.0
    return keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0


def _long_rope(path: Path, keys: Mapping[str, Any], table: Mapping[str, GgufTensor]) -> LongRope | None:
    """LongRoPE's factors; or divisors that are the same at every length, which is LongRoPE with equal ones."""
    original = keys.get("rope.scaling.original_context_length", keys["context_length"])
    if _SHORT_FACTORS in table:
        if "rope.scaling.original_context_length" not in keys:
            warnings.warn(
                f"{path}: rope.scaling.original_context_length is missing: as in llama.cpp, it is the context length, "
                f"{original}, so that LongRoPE's long factors are not used within it",
                stacklevel=5,
            )
        short, long = (_factors(table[name]) for name in (_SHORT_FACTORS, _LONG_FACTORS))
        factor = keys.get("rope.scaling.attn_factor")
        attention_factor = None if factor is None else _shortest(factor)
        return LongRope(short, long, original, attention_factor=attention_factor)
    linear = _shortest(_linear_factor(keys))
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    # A damaged number can be very large; `Phi3Config` compares the length of the list with the size of a head.
    pairs = min(keys.get("rope.dimension_count", head_dim) // 2, 1 << 16)
    divisors = _factors(table[_ROPE_FACTORS]) if _ROPE_FACTORS in table else (1.0,) * pairs
    divisors = tuple(divisor * linear for divisor in divisors)
    if all(divisor == 1 for divisor in divisors):
        return None
    return LongRope(divisors, divisors, keys["context_length"], attention_factor=1.0)


def _factors(tensor: GgufTensor) -> tuple[float, ...]:
    return tuple(_shortest(value) for value in read_tensor(tensor).ravel())


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


def _end_ids(path: Path, metadata: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = sorted(end_ids([token_id for token_id in named if token_id is not None], tokenizer))
    if any(not 0 <= token_id < vocab_size for token_id in ids):
        raise damaged(path, f"ids {ids} that end a text, but an embedding of {vocab_size} rows")
    return tuple(ids)

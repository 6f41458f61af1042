"""A Checkpoint -> a GGUF file of architecture phi3, which llama.cpp runs with the same numbers.

The tensors are those of the checkpoint under other names: phi3 keeps q, k, v and gate, up fused, and its rotary pairs
lie half a head apart as here, so that rows keep their order. A model that was read from a `llama` file fits, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np

from phi3_jax.checkpoint.assemble import named_tensors
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.checkpoint.checksums import crc32
from phi3_jax.checkpoint.gguf.tensors import checksum_trailer
from phi3_jax.checkpoint.gguf.tokenizer_writer import lost_flags, tokenizer_metadata
from phi3_jax.checkpoint.load_save import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model.rope import attention_factor
from phi3_jax.progress import OnProgress

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_BLOCK = 32  # values that share a scale in both quantised types
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# A token that ends a turn, rather than the text, has a key of its own.
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>")
# For models of this name, llama.cpp drops white space after each special token except the last three of these.
_PHI3_NAME, _PHI3_TOKENS = "phi-3", ("</s>", "<unk>", "<s>", "<|endoftext|>")
_ROWS_AT_A_TIME = 256  # of a quantised tensor: few enough that the intermediates stay in the processor's cache
_THREADS = min(8, os.cpu_count() or 1)


def save_gguf(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    kind: GgufType = "bf16",
    *,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Writes one GGUF file, which appears whole or not at all. The host holds the model and one tensor more.

    Args:
      kind: what the matrices become, the embedding's included; q8_0 and q4_0 are rounded exactly as by llama.cpp. Norms
        are float32. Rows that are no whole number of 32-value blocks stay bf16 in the quantised types.
      on_progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
      Remarks, one sentence each: where other programs are known to compute something different from the file.

    Raises:
      FileExistsError: the file is there already.
      ImportError: the extra `gguf` is not installed.
      OSError: there is not enough room for it.
      ValueError: the type is unknown; the checkpoint is quantised or packed; llama.cpp's phi3 cannot compute the model,
        or GGUF cannot describe its tokenizer; a value does not fit into float16.
    """
    gguf = _gguf()
    target = Path(path)
    if kind not in _FILE_TYPES:
        raise ValueError(f"type {kind!r} is not one of {sorted(_FILE_TYPES)}")
    if problems := _problems(checkpoint.config):
        raise ValueError(f"{target}: llama.cpp's phi3 cannot compute this model: {'; '.join(problems)}")
    leaves = flax.traverse_util.flatten_dict(checkpoint.params, sep="/")
    if other := [name for name, leaf in leaves.items() if not isinstance(leaf, jax.Array | np.ndarray)]:
        raise ValueError(f"{other[0]} is no longer floats: load the checkpoint with layout='rows' and without quantize")
    metadata, remarks = _metadata(checkpoint)
    # Shapes first, for the table in the header; values are written later, one tensor at a time.
    plan = [(_gguf_name(name), *_layout(tensor.shape, kind)) for name, tensor in _tensors(checkpoint)]
    if kept := sorted({name.split(".")[-2] for name, as_kind, shape, _ in plan if as_kind != kind and len(shape) > 1}):
        remarks.append(f"rows of {', '.join(kept)} are no whole number of {_BLOCK}-value blocks: stored as bf16")
    total, done = sum(size for *_, size in plan), 0
    checksums: list[int] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target, total) as partial:
        writer = gguf.GGUFWriter(partial, "phi3")
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for name, as_kind, shape, size in plan:
                number = gguf.GGMLQuantizationType[as_kind.upper()]
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (name, as_kind, _, size), (_, tensor) in zip(plan, _tensors(checkpoint), strict=True):
                encoded = _encode(tensor, as_kind, name)
                checksums.append(crc32(encoded))
                writer.write_tensor_data(encoded)
                done += size
                if on_progress:
                    on_progress(done, total)
        finally:
            writer.close()
        trailer = checksum_trailer(partial, checksums)
        with partial.open("ab") as file:
            file.write(trailer)
    return remarks


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("writing GGUF files needs the gguf package: pip install 'phi3_jax[gguf]'") from None
    return gguf


def _problems(config: Phi3Config) -> list[str]:
    found = []
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        found.append(
            f"{config.num_attention_heads} heads of {config.head_dim} do not make its width, {config.hidden_size}"
        )
    if config.rotary_dim % 2:
        found.append(f"an odd number of rotated dimensions, {config.rotary_dim}")
    return found


def _metadata(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The file's keys, and remarks on what they cannot say."""
    config, tokenizer, remarks = checkpoint.config, checkpoint.tokenizer, []
    metadata = {f"phi3.{key}": value for key, value in _architecture_keys(config).items()}
    metadata["general.name"] = "decoder"
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        remarks.append(
            f"llama.cpp ignores the sliding window of {config.sliding_window} tokens in phi3 models: longer texts give "
            "other numbers there"
        )
    if config.long_rope is not None and config.long_rope.short_factor != config.long_rope.long_factor:
        remarks.append(
            "llama.cpp takes LongRoPE's long factors wherever its context size (n_ctx) is above "
            f"{config.long_rope.original_max_position_embeddings}, however short the text is"
        )
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "no_vocab"
        if config.bos_token_id is not None:
            metadata["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    else:
        metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
        contents = {token.content for token in tokenizer.added_tokens}
        if contents.issuperset(_PHI3_TOKENS) and all(
            token.rstrip == (token.content not in _PHI3_TOKENS[1:]) for token in tokenizer.added_tokens
        ):
            metadata["general.name"] = _PHI3_NAME
        if lost := lost_flags(tokenizer, metadata | {"general.architecture": "phi3"}):
            remarks.append(f"GGUF cannot say how {lost[:5]} treat what lies beside them ({len(lost)} added tokens)")
    if config.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = config.pad_token_id
    ends = _end_ids(checkpoint)
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    if len(ends) > len(keys):
        remarks.append(f"GGUF has room for {len(keys)} ids that end an answer: {ends[len(keys) :]} are left out")
    return metadata | dict(zip(keys, ends, strict=False)), remarks


def _architecture_keys(config: Phi3Config) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
    if config.long_rope is not None:
        keys["rope.scaling.original_context_length"] = config.long_rope.original_max_position_embeddings
        keys["rope.scaling.attn_factor"] = float(attention_factor(config))
    return keys


def _end_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end an answer: the text's end first, then a turn's."""
    named = dict.fromkeys([*checkpoint.config.eos_token_id, *checkpoint.generation.eos_token_ids])
    ids = [token_id for token_id in named if 0 <= token_id < checkpoint.config.vocab_size]  # others end no answer
    if (tokenizer := checkpoint.tokenizer) is None:
        return ids
    turns = [token_id for token_id in ids if tokenizer.piece(token_id) in _TURN_ENDS]
    return list(dict.fromkeys([*[i for i in (tokenizer.eos_id,) if i is not None], *ids[:1], *turns, *ids]))


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    if (rope := checkpoint.config.long_rope) is not None:
        yield "rope_factors_long.weight", np.asarray(rope.long_factor, np.float32)
        yield "rope_factors_short.weight", np.asarray(rope.short_factor, np.float32)
    yield from named_tensors(checkpoint.params)


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.down_proj.weight -> blk.3.ffn_down.weight."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES.get(stem, stem)}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _layout(shape: tuple[int, ...], kind: str) -> tuple[str, tuple[int, ...], int]:
    """What a tensor becomes -> (type, shape, bytes)."""
    if len(shape) == 1:
        kind = "f32"
    elif kind not in _DTYPES and shape[-1] % _BLOCK:
        kind = "bf16"
    values = math.prod(shape)
    if kind in _DTYPES:
        return kind, shape, values * _DTYPES[kind].itemsize
    block, size = _gguf().GGML_QUANT_SIZES[_gguf().GGMLQuantizationType[kind.upper()]]
    return kind, shape, values // block * size


def _encode(tensor: np.ndarray, kind: str, name: str) -> np.ndarray:
    """A tensor's bytes in the file."""
    if kind in _DTYPES:
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(tensor.astype(_DTYPES[kind], copy=False))
        if kind == "f16" and not np.isfinite(cast).all() and np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(f"{name} has values beyond float16's largest, 65504: export as bf16 or f32")
        return cast
    gguf = _gguf()
    number = gguf.GGMLQuantizationType[kind.upper()]
    parts = [tensor[start : start + _ROWS_AT_A_TIME] for start in range(0, len(tensor), _ROWS_AT_A_TIME)]
    with ThreadPoolExecutor(_THREADS) as pool:
        encoded = pool.map(lambda part: gguf.quants.quantize(part.astype(np.float32), number), parts)
        return np.concatenate(list(encoded))


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        float: writer.add_float32,
        int: writer.add_uint32,
        list: writer.add_array,
        str: writer.add_string,
    }
    adders[type(value)](key, value)

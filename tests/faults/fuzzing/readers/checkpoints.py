"""Models in files: safetensors, quantised and packed ones, GGUF, adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
from adapters import random_adapter

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import save_adapter
from phi3_jax.checkpoint.gguf.tokenizer_writer import tokenizer_metadata
from phi3_jax.checkpoint.gguf.writer import save_gguf

from ..reader import Read, Reader
from .parts import model, of_checkpoint, with_changes

_SHARD = 20_000  # bytes
_FILES = {
    "config.json": 4, "generation_config.json": 2, "*.index.json": 2, "*.safetensors": 6, "tokenizer*": 0.5,
    "*.jinja": 0.2, "*.json": 0.5,
}  # fmt: skip


# ---------------------------------------------------------------- safetensors


def _make_folder(folder: Path, variant: int) -> None:
    """Phi-3 in shards; Llama's names in one file, in bfloat16; tied, in float16."""
    if variant == 0:
        phi3_jax.save(model(), folder / "x", _SHARD)
    elif variant == 1:
        small = with_changes(model(), long_rope=None)
        params = phi3_jax.random_params(small.config, "bfloat16")
        phi3_jax.save(dataclasses.replace(small, params=params), folder / "x", architecture="llama")
    else:
        small = with_changes(model(), tie_word_embeddings=True, sliding_window=None)
        params = phi3_jax.random_params(small.config, "float16")
        phi3_jax.save(dataclasses.replace(small, params=params), folder / "x", _SHARD)
    _up(folder)


def _up(folder: Path) -> None:
    """What was saved in the folder "x" below this one comes up."""
    for path in (folder / "x").iterdir():
        path.rename(folder / path.name)
    (folder / "x").rmdir()


def _load(folder: Path, _: int) -> Read:
    return of_checkpoint(phi3_jax.load(folder))


def _make_quantized(folder: Path, variant: int) -> None:
    _make_folder(folder, 0)
    policy, layout = [("int8", "rows"), ("int4", "rows"), ("int4-mixed", "packed"), (None, "packed")][variant]
    loaded: Any = phi3_jax.load(folder, "bfloat16", quantize=policy, layout=layout)  # type: ignore[arg-type]
    phi3_jax.save(loaded, folder / "quantized")
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    (folder / "quantized").rename(folder / "x")
    _up(folder)


# ---------------------------------------------------------------- GGUF


def _make_gguf(folder: Path, variant: int) -> None:
    """Written by us in three types; raw blocks of many types under Llama's names; in parts."""
    small = with_changes(model(), hidden_size=48, head_dim=8, rope_theta=1e4)
    if variant < 3:
        kind: Any = ("f32", "q8_0", "q4_0")[variant]
        wide = with_changes(model(), hidden_size=64, intermediate_size=96, num_attention_heads=8)
        save_gguf(wide, folder / "model.gguf", kind)
    elif variant == 3:
        gguf_files.write(folder / "model.gguf", *_of_many_types(small))
    else:
        _write_parts(folder, small)


def _keys(small: phi3_jax.Checkpoint) -> dict[str, Any]:
    """The tokenizer's."""
    assert small.tokenizer is not None
    return {key: value for key, value in tokenizer_metadata(small.tokenizer, small.config.vocab_size).items()
            if key.startswith("tokenizer.")}  # fmt: skip


def _of_many_types(small: phi3_jax.Checkpoint) -> tuple[phi3_jax.Phi3Config, dict[str, Any], str, Any]:
    wide = with_changes(
        small, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=1, long_rope=None, sliding_window=None,
    )  # fmt: skip
    types = iter(["Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_1", "Q4_0", "Q5_0", "BF16", "F16", "F32"] * 3)
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, tensor in gguf_files.as_llama(wide).items():
        if tensor.ndim == 1:
            tensors[name] = tensor
            continue
        kind = gguf_files.TYPES[next(types)]
        block, size = gguf_files.gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 60, (tensor.shape[0], tensor.shape[1] // block * size), dtype=np.uint8)
        tensors[name] = (raw, kind)
    return wide.config, tensors, "llama", lambda keys: keys.update(_keys(wide))


def _write_parts(folder: Path, small: phi3_jax.Checkpoint) -> None:
    tensors = gguf_files.as_phi3(small)
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}]
    factors = 2  # of LongRoPE, which `write` puts into the first part
    for number, half in enumerate(halves):
        split = {"split.no": np.uint16(number), "split.count": np.uint16(2)}
        split["split.tensors.count"] = np.int32(len(tensors) + factors)

        def change(keys: dict[str, Any], number: int = number, split: dict[str, Any] = split) -> None:
            if number:
                keys.clear()
            else:
                keys.update(_keys(small))
            keys.update(split)

        config = small.config if number == 0 else dataclasses.replace(small.config, long_rope=None)
        gguf_files.write(folder / f"model-{number + 1:05d}-of-00002.gguf", config, half, "phi3", change)


def _load_gguf(folder: Path, variant: int) -> Read:
    name = "model.gguf" if variant < 4 else "model-00001-of-00002.gguf"
    quantize = "stored" if variant in (1, 2) else None
    return of_checkpoint(phi3_jax.load(folder / name, quantize=quantize))


# ---------------------------------------------------------------- adapters


def _make_adapter(folder: Path, variant: int) -> None:
    lora = LoraConfig(rank=3, alpha=5.0) if variant == 0 else LoraConfig(rank=2, alpha=3.0, dora=True, rslora=True)
    save_adapter(folder / "x", random_adapter(model().config, lora), lora, model().config, "base")
    _up(folder)


def _load_adapter(folder: Path, variant: int) -> Read:
    base = folder.parent.parent / "base"
    if not base.exists():
        phi3_jax.save(model(), base)
    return {"weights": of_checkpoint(phi3_jax.load(base, adapter=folder))["weights"]}


READERS = {
    "safetensors": Reader(_make_folder, _load, 3, _FILES, strict=("model.safetensors.index.json",), checksums=True),
    "quantised": Reader(_make_quantized, _load, 4, _FILES, strict=("config.json:quantization_config",), checksums=True),
    "gguf": Reader(_make_gguf, _load_gguf, 5, cost=1.5),
    "adapter": Reader(_make_adapter, _load_adapter, 2, checksums=True),
}

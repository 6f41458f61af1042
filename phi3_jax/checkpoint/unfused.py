"""Llama's and Mistral's tensors <-> Phi-3's: the same decoder, with q, k and v, and gate and up, in one matrix each.

Hugging Face's files of all three have their rotary pairs half a head apart, so that rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config

# What wrappers put before the names of their model, and how to be rid of it.
_WRAPPERS = {
    "module.": "torch's DataParallel; save `model.module` instead",
    "_orig_mod.": "torch.compile; save `model._orig_mod` instead",
    "base_model.model.": "PEFT; save what `merge_and_unload()` returns instead",
}
_INSIDE = ("embed_tokens.", "layers.", "norm.")  # of `model`, the decoder without its head


def _parts(config: Phi3Config) -> dict[str, dict[str, int]]:
    """Name of a fused matrix -> the names and rows of its parts, in their order."""
    N, K, H, F = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": N * H, "self_attn.k_proj": K * H, "self_attn.v_proj": K * H},
        "mlp.gate_up_proj": {"mlp.gate_proj": F, "mlp.up_proj": F},
    }


def published_names(sources: Mapping[str, TensorSource], origin: str) -> dict[str, TensorSource]:
    """The tensors under the names of `Phi3ForCausalLM` or `LlamaForCausalLM`, without those that hold no number.

    As transformers does, it adds a `model.` that is missing (the decoder was saved without its head), and removes one
    that is there twice.

    Raises:
      ValueError: the names have the prefix of a wrapper, or two tensors have one name.
    """
    found: dict[str, TensorSource] = {}
    for name, source in sources.items():
        if 0 in source.shape:
            continue
        wrapper = next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)
        if wrapper is not None:
            raise ValueError(f"{origin}: tensor {name} was saved from within {_WRAPPERS[wrapper]}, for plain names")
        plain = name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
        plain = f"model.{plain}" if plain.startswith(_INSIDE) else plain
        if plain in found:
            raise ValueError(f"{origin}: there are two tensors {plain}, with and without a prefix: remove one of them")
        found[plain] = source
    return found


def fused(sources: Mapping[str, TensorSource], config: Phi3Config, origin: str) -> dict[str, TensorSource]:
    """Phi-3's tensors of those of any of the three; what is fused is concatenated whenever it is read.

    Raises:
      ValueError: some layers are fused and others are not, or a part has the wrong number of rows.
    """
    found = dict(sources)
    for whole, parts in _parts(config).items():
        whole_ends, ends = f".{whole}.weight", tuple(f".{part}.weight" for part in parts)
        unfused = sorted({name.removesuffix(end) for name in sources for end in ends if name.endswith(end)})
        fused_ones = sorted(name for name in sources if name.endswith(whole_ends))
        if unfused and fused_ones:
            raise ValueError(
                f"{origin}: {fused_ones[0]} is one matrix, but {unfused[0]}{ends[0]} and others are parts of one: the "
                "files of two checkpoints are mixed; keep those of one"
            )
        for layer in unfused:
            if absent := [layer + end for end in ends if layer + end not in found]:
                raise ValueError(f"{origin}: the weights do not fit the configuration; missing tensors: {absent}")
            ours = {layer + end: found.pop(layer + end) for end in ends}
            width = next(iter(ours.values())).shape[1:]
            for (name, source), rows in zip(ours.items(), parts.values(), strict=True):
                if source.shape != (rows, *width):
                    raise ValueError(
                        f"{origin}: the weights do not fit the configuration; wrong shapes: {name} is "
                        f"{list(source.shape)} instead of {[rows, config.hidden_size]}"
                    )
            found[layer + whole_ends] = concatenated(list(ours.values()))
    return found


def concatenated(parts: list[TensorSource]) -> TensorSource:
    """The rows of several matrices, [O1 + O2 + ..., I]; in float32 if their dtypes differ."""
    dtypes = {part.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

    def read() -> np.ndarray:
        arrays = [part.read() for part in parts]
        return np.concatenate([a if a.dtype.name == dtype else a.astype(dtype) for a in arrays])

    return TensorSource((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype, read)


def unfused(tensors: Iterable[tuple[str, np.ndarray]], config: Phi3Config) -> Iterator[tuple[str, np.ndarray]]:
    """Phi-3's named tensors -> Llama's, which are views of them."""
    split = {f".{whole}.weight": parts for whole, parts in _parts(config).items()}
    for name, tensor in tensors:
        end = next((end for end in split if name.endswith(end)), None)
        if end is None:
            yield name, tensor
            continue
        start = 0
        for part, rows in split[end].items():
            yield f"{name.removesuffix(end)}.{part}.weight", tensor[start : start + rows]
            start += rows

"""The keys of a config.json: which change nothing, which must have one value, what absent ones mean; rotary ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phi3_jax.json_files import is_number, shown

# Keys that cannot change a logit: bookkeeping, and dropout on the embedding, which transformers never applies.
_BOOKKEEPING = frozenset({
    "architectures", "auto_map", "bos_token", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token",
    "gradient_checkpointing", "id2label", "is_encoder_decoder", "is_llama_config", "label2id", "max_sequence_length",
    "model_type", "name_or_path", "neftune_noise_alpha", "num_key_value_groups", "output_attentions",
    "output_hidden_states", "pad_token", "pretraining_tp", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip
# What transformers 4 adds in a full dump of any configuration, and its Phi-3 never reads: encoders, heads for other
# tasks, and settings of generation, which have a file of their own.
_OF_EVERY_MODEL = frozenset({
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "is_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "torchscript", "typical_p",
})  # fmt: skip
# Keys that are accepted with these values only, because the decoder has no code for others.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "rope_interleaved": (False, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
}
# Dropout inside of the layers, which is not applied here: it changes how the reference trains, and no logit.
DROPOUT_KEYS = ("attention_dropout", "resid_pdrop")
# transformers reads neither of these, although the published LongRoPE files have them.
INERT_ROPE_KEYS = frozenset({"short_mscale", "long_mscale"})
LONG_ROPE_NAMES = frozenset({"longrope", "su", "yarn"})  # Phi-3's; for other model types, yarn is something else

# What an absent key means: the defaults of transformers' configuration class for this model_type.
_SHARED: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_SHARED |= {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    "llama": _SHARED | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _SHARED
    | {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


def is_inert(key: str) -> bool:
    """Whether a key cannot change what the model computes; transformers' own bookkeeping begins with an underscore."""
    return key.startswith("_") or key in _BOOKKEEPING or key in _OF_EVERY_MODEL


def rope_keys(raw: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Removes the rotary keys of either layout from raw -> (rope dictionary, theta, partial_rotary_factor)."""
    scaling, parameters = (raw.pop(key, None) for key in ("rope_scaling", "rope_parameters"))
    for given in (scaling, parameters):
        if not isinstance(given, Mapping | None):
            raise ValueError(f"rope_scaling / rope_parameters must be a dictionary or null, not {shown(given)}")
    if scaling and parameters and scaling != parameters:
        raise ValueError("rope_scaling and rope_parameters are both given and differ: keep one of them")
    rope = dict(scaling or parameters or {})

    def one_of(key: str) -> Any:
        values = [v for v in (raw.pop(key, None), rope.pop(key, None)) if v is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(
                f"{key} is {shown(values[0])} at the top level but {shown(values[1])} among the rope parameters"
            )
        return values[0] if values else None

    return rope, one_of("rope_theta"), one_of("partial_rotary_factor")


_MOST_ROTARY = 1 << 16


def rope_divisors(
    kind: str, rope: Mapping[str, Any], original: Any, theta: float, rotary_dim: int
) -> tuple[float, ...]:
    """Llama's scalings of the rotary frequencies, which do not depend on the length: what each is divided by.

    linear divides all frequencies by `factor`. llama3 divides those of which less than `low_freq_factor` periods fit
    into the original length, keeps those of which more than `high_freq_factor` do, and interpolates between them.

    Raises ValueError if the factors are missing or make no sense.
    """
    given: dict[str, Any] = {key: rope.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    factor, low, high = (given["factor"], 0, 1) if kind == "linear" else given.values()
    if not all(is_number(value) for value in (factor, low, high, original)) or factor <= 0 or not 0 <= low < high:
        raise ValueError(
            f"rope type {kind!r} needs a positive factor, and llama3 a low and a higher one, not {shown(given)}"
        )
    if rotary_dim > _MOST_ROTARY:  # a damaged number; the list would be as long
        raise ValueError(f"{rotary_dim} rotated dimensions are more than any model has")
    divisors = []
    for i in range(rotary_dim // 2):
        periods = original * theta ** (-2 * i / rotary_dim) / (2 * math.pi)
        kept = 0.0 if kind == "linear" else min(max((periods - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)

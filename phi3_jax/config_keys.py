"""The keys of a config.json: which ones change nothing, which must have one value, and what absent ones mean."""

from __future__ import annotations

from typing import Any

# Keys that cannot change a logit: bookkeeping, and dropout on the embedding, which transformers never applies.
_BOOKKEEPING = frozenset({
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "embd_pdrop", "gradient_checkpointing", "id2label",
    "is_encoder_decoder", "is_llama_config", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pretraining_tp", "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers.js_config",
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

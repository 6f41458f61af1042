"""The model's configuration: one frozen dataclass, read strictly from a checkpoint's config.json.

"Strictly" means that a key which could change the numbers is either understood or refused. If unknown keys were
skipped, the results could differ from the published model's, and nobody would notice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Keys that cannot change a logit: bookkeeping, and dropout on the embedding, which transformers never applies.
_BOOKKEEPING = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "gradient_checkpointing",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
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
INERT_KEYS = _BOOKKEEPING | _OF_EVERY_MODEL
# Keys that are accepted with these values only, because the decoder has no code for others.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
}
# transformers reads neither of these, although the published LongRoPE files have them.
INERT_ROPE_KEYS = frozenset({"short_mscale", "long_mscale"})
LONG_ROPE_NAMES = frozenset({"longrope", "su", "yarn"})


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): one divisor per frequency, in two sets, chosen by the length of the sequence.

    Attributes:
      short_factor: divisors for sequences of at most `original_max_position_embeddings` tokens; rotary_dim/2 of them.
      long_factor: divisors for longer sequences, used for all of their tokens.
      original_max_position_embeddings: the longest sequence, in tokens, that uses `short_factor`.
      factor: the context extension that `attention_factor` is derived from; None means max_position / original.
      attention_factor: multiplies cos and sin; None means sqrt(1 + ln(factor) / ln(original)), or 1 if factor <= 1.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Phi3Config:
    """Sizes and constants of a `Phi3ForCausalLM` decoder, with Hugging Face's names.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers: V, D, F and L.
      num_attention_heads, num_key_value_heads, head_dim: N, K and H; N is a multiple of K.
      max_position_embeddings: the context length, in tokens.
      rms_norm_eps: added to the mean square inside of the square root.
      rope_theta: base of the rotary frequencies.
      partial_rotary_factor: the fraction of head_dim that is rotated.
      long_rope: LongRoPE factors, or None for plain rotary embeddings.
      sliding_window: number of keys that a query sees, itself included; None means all.
      tie_word_embeddings: the output head is the embedding matrix.
      bos_token_id, eos_token_id, pad_token_id: special ids; the pad row of the embedding gets no gradient.
      initializer_range: standard deviation of freshly initialised weights.

    Raises:
      ValueError: from the constructor, when the sizes contradict one another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0
    long_rope: LongRope | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def rotary_dim(self) -> int:
        """Number of head dimensions that are rotated; an odd number also rotates the next one, to make a pair."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], path: str = "config.json") -> Phi3Config:
        """Reads the contents of a Hugging Face config.json, in the layout of transformers 4 or 5.

        Args:
          raw: the parsed file.
          path: its name, for messages.

        Raises:
          ValueError: a key is missing, unknown, of the wrong type, or has a value that the decoder does not implement.
        """
        try:
            return _parse(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The config.json of a `Phi3ForCausalLM` checkpoint, in the layout of the published files (transformers 4)."""
        fields = dataclasses.asdict(self)
        long_rope = fields.pop("long_rope")
        eos = fields.pop("eos_token_id")
        fields["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
        fields["rope_scaling"] = None
        if long_rope is not None:
            fields["original_max_position_embeddings"] = long_rope.pop("original_max_position_embeddings")
            given = {key: list(v) if isinstance(v, tuple) else v for key, v in long_rope.items() if v is not None}
            fields["rope_scaling"] = {"type": "longrope", **given}
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            "attention_bias": False,
            **fields,
        }


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def _problems(config: Phi3Config) -> list[str]:
    """What is wrong with the sizes, one sentence each."""
    found = [
        f"{name} must be a positive integer, not {getattr(config, name)!r}"
        for name in _COUNTS
        if not _is_count(getattr(config, name))
    ]
    if found:
        return found
    if config.num_attention_heads % config.num_key_value_heads:
        found.append(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    for name in ("rope_theta", "rms_norm_eps", "partial_rotary_factor", "initializer_range"):
        value = getattr(config, name)
        if not _is_number(value) or value <= 0:
            found.append(f"{name} must be a positive number, not {value!r}")
    if found:
        return found
    # An odd number is rounded up to whole pairs; LongRoPE needs an even one, for a factor in its lists for each pair.
    pairs, odd = divmod(config.rotary_dim, 2)
    if config.rotary_dim < 1 or 2 * (pairs + odd) > config.head_dim or (odd and config.long_rope):
        found.append(
            f"head_dim={config.head_dim} x partial_rotary_factor={config.partial_rotary_factor} gives "
            f"{config.rotary_dim} rotated dimensions: there must be whole pairs, within the head"
        )
    if config.sliding_window is not None and not _is_count(config.sliding_window):
        found.append(f"sliding_window must be a positive integer or null, not {config.sliding_window!r}")
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and not (_is_int(value) and 0 <= value < config.vocab_size):
            found.append(f"{name}={value!r} is not an id below vocab_size={config.vocab_size}")
    if not all(_is_int(value) for value in config.eos_token_id):
        found.append(f"eos_token_id must be an id or a list of ids, not {config.eos_token_id!r}")
    if not isinstance(config.tie_word_embeddings, bool):
        found.append(f"tie_word_embeddings must be true or false, not {config.tie_word_embeddings!r}")
    return found + (_long_rope_problems(config, config.long_rope) if config.long_rope else [])


def _long_rope_problems(config: Phi3Config, rope: LongRope) -> list[str]:
    found = []
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if not isinstance(factors, tuple) or len(factors) != config.rotary_dim // 2:
            length = len(factors) if isinstance(factors, tuple) else repr(factors)
            found.append(f"LongRoPE {name} must list rotary_dim/2 = {config.rotary_dim // 2} numbers, not {length}")
        elif not all(_is_number(value) and value > 0 for value in factors):
            found.append(f"LongRoPE {name} must hold positive numbers only")
    if not _is_count(rope.original_max_position_embeddings) or rope.original_max_position_embeddings < 2:
        found.append(
            "original_max_position_embeddings must be an integer above 1, not "
            f"{rope.original_max_position_embeddings!r}"
        )
    for name in ("factor", "attention_factor"):
        value = getattr(rope, name)
        if value is not None and not (_is_number(value) and value > 0):
            found.append(f"LongRoPE {name} must be a positive number or absent, not {value!r}")
    return found


def _parse(raw: Mapping[str, Any]) -> Phi3Config:
    raw = dict(raw)
    model_type = raw.get("model_type")
    if model_type != "phi3":
        raise ValueError(f"model_type is {model_type!r}, but only 'phi3' checkpoints (Phi3ForCausalLM) can be loaded")
    for key, allowed in FIXED_KEYS.items():
        if (value := raw.pop(key, allowed[0])) not in allowed:
            raise ValueError(f"{key}={value!r} is not supported, only {allowed[0]!r} is implemented")

    if (quantization := raw.pop("quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"quantization_config: weights that were quantised by {method!r} cannot be read; load the checkpoint that "
            "they were made from, and quantise it here (quantize=..., or phi3-quantize)"
        )
    fields: dict[str, Any] = {}
    rope, theta, partial = _rope_keys(raw)
    original = raw.pop("original_max_position_embeddings", None)
    # As in transformers, the value at the top level takes precedence over the one among the rope parameters.
    original = rope.pop("original_max_position_embeddings", None) if original is None else original
    for field in dataclasses.fields(Phi3Config):
        if field.name in raw:
            fields[field.name] = raw.pop(field.name)
    unknown = sorted(key for key in raw.keys() - INERT_KEYS if raw[key] is not None)  # null: the default
    if unknown:
        raise ValueError(
            f"unsupported keys {unknown}; they may change what the model computes: remove them only if you "
            "know that they do not"
        )
    if theta is None:
        raise ValueError("rope_theta is missing (at the top level, or in rope_parameters); it is never guessed")
    fields |= {"rope_theta": theta, "long_rope": _long_rope(rope, original)}
    if partial is not None:
        fields["partial_rotary_factor"] = partial

    required = {f.name for f in dataclasses.fields(Phi3Config) if f.default is dataclasses.MISSING}
    missing = sorted(required - fields.keys() - {"num_key_value_heads", "head_dim"})
    if missing:
        raise ValueError(f"keys {missing} are missing")
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("head_dim") is None:
        fields["head_dim"] = _derived_head_dim(fields["hidden_size"], fields["num_attention_heads"])
    eos = fields.get("eos_token_id")
    fields["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return Phi3Config(**fields)


def _rope_keys(raw: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Removes the rotary keys of either layout from raw -> (rope dictionary, theta, partial_rotary_factor)."""
    scaling, parameters = raw.pop("rope_scaling", None), raw.pop("rope_parameters", None)
    if scaling and parameters and scaling != parameters:
        raise ValueError("rope_scaling and rope_parameters are both given and differ: keep one of them")
    rope = scaling or parameters or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling / rope_parameters must be a dictionary or null, not {rope!r}")
    rope = dict(rope)

    def one_of(key: str) -> Any:
        values = [v for v in (raw.pop(key, None), rope.pop(key, None)) if v is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f"{key} is {values[0]!r} at the top level but {values[1]!r} among the rope parameters")
        return values[0] if values else None

    return rope, one_of("rope_theta"), one_of("partial_rotary_factor")


def _long_rope(rope: dict[str, Any], original: Any) -> LongRope | None:
    kinds = {rope.pop(key) for key in ("type", "rope_type") if key in rope} or {"default"}
    rope = {key: value for key, value in rope.items() if key not in INERT_ROPE_KEYS}
    rope.pop("original_max_position_embeddings", None)
    if not (kinds <= LONG_ROPE_NAMES or kinds == {"default"}):
        raise ValueError(
            f"rope type {sorted(map(str, kinds))} is not supported; known are default, longrope, su and yarn"
        )
    allowed = set() if kinds == {"default"} else {"short_factor", "long_factor", "factor", "attention_factor"}
    if unknown := sorted(rope.keys() - allowed):
        raise ValueError(f"unsupported rope keys {unknown} for rope type {sorted(kinds)}")
    if kinds == {"default"}:
        return None
    missing = [key for key in ("short_factor", "long_factor") if not isinstance(rope.get(key), list)]
    if missing:
        raise ValueError(f"LongRoPE needs lists of numbers in {missing}")
    if original is None:
        raise ValueError("LongRoPE needs original_max_position_embeddings")
    return LongRope(
        short_factor=tuple(rope["short_factor"]),
        long_factor=tuple(rope["long_factor"]),
        original_max_position_embeddings=original,
        factor=rope.get("factor"),
        attention_factor=rope.get("attention_factor"),
    )


def _derived_head_dim(hidden_size: Any, heads: Any) -> int:
    """hidden_size / num_attention_heads, rounded down as in transformers."""
    if not (_is_count(hidden_size) and _is_count(heads)) or hidden_size < heads:
        raise ValueError(f"hidden_size={hidden_size!r} cannot be split into num_attention_heads={heads!r}")
    return int(hidden_size) // int(heads)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

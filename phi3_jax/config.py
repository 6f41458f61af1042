"""The model's configuration: one frozen dataclass, read strictly from a checkpoint's config.json.

"Strictly" means that a key which could change the numbers is either understood or refused. If unknown keys were
skipped, the results could differ from the published model's, and nobody would notice.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from phi3_jax.config_keys import (
    DEFAULTS,
    DROPOUT_KEYS,
    FIXED_KEYS,
    INERT_ROPE_KEYS,
    LONG_ROPE_NAMES,
    is_inert,
    rope_divisors,
    rope_keys,
)
from phi3_jax.json_files import LARGEST, SMALLEST, is_number, is_whole, shown
from phi3_jax.spelling import did_you_mean

Architecture = Literal["phi3", "llama"]


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

    The same decoder is Llama's and Mistral's, whose files have its matrices in parts (checkpoint/unfused.py).

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
          raw: the parsed file, of model_type phi3, llama or mistral; absent keys have the defaults of that class.
          path: its name, for messages.

        Warns:
          UserWarning: a key is left out that the reference does not apply, either, when it computes logits.

        Raises:
          ValueError: a key is unknown, of the wrong type, or has a value that the decoder does not implement.
        """
        try:
            return _parse(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_hf(self, architecture: Architecture = "phi3") -> dict[str, Any]:
        """The contents of a config.json, in the layout of the published files (transformers 4).

        Args:
          architecture: "phi3", or "llama" for a `LlamaForCausalLM`; where there is a window, a `MistralForCausalLM`.

        Raises:
          ValueError: Llama does not compute this model.
        """
        fields = dataclasses.asdict(self)
        long_rope = fields.pop("long_rope")
        eos = fields.pop("eos_token_id")
        fields["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
        fields["rope_scaling"] = None
        if long_rope is not None:
            fields["original_max_position_embeddings"] = long_rope.pop("original_max_position_embeddings")
            given = {key: list(v) if isinstance(v, tuple) else v for key, v in long_rope.items() if v is not None}
            fields["rope_scaling"] = {"type": "longrope", **given}
        name, model_type = "Phi3", "phi3"
        if architecture == "llama":
            name, model_type = ("Llama", "llama") if self.sliding_window is None else ("Mistral", "mistral")
            if problems := _llama_problems(self):
                raise ValueError(f"{name}ForCausalLM does not compute this model: {'; '.join(problems)}")
            for key in ("partial_rotary_factor", "original_max_position_embeddings"):
                fields.pop(key, None)
            if model_type == "llama":
                del fields["sliding_window"]
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": model_type,
            "hidden_act": "silu",
            "attention_bias": False,
            **fields,
        }


_IN_FLOAT32 = f"that float32 holds ({SMALLEST:.2g} to {LARGEST:.2g})"
# What the shapes of the weights follow from.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_COUNTS = (*SIZES, "max_position_embeddings")


def _problems(config: Phi3Config) -> list[str]:
    """What is wrong with the sizes, one sentence each."""
    found = [
        f"{name} must be a positive integer below 2**31, not {shown(getattr(config, name))}"
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
        if not is_number(value) or value < 0 or (value == 0 and name != "initializer_range"):
            found.append(f"{name} must be a positive number {_IN_FLOAT32}, not {shown(value)}")
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
        found.append(
            f"sliding_window must be a positive integer below 2**31 or null, not {shown(config.sliding_window)}"
        )
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and not (_is_int(value) and 0 <= value < config.vocab_size):
            found.append(f"{name}={shown(value)} is not an id below vocab_size={config.vocab_size}")
    if not all(_is_int(value) for value in config.eos_token_id):
        found.append(f"eos_token_id must be an id or a list of ids, not {shown(config.eos_token_id)}")
    if not isinstance(config.tie_word_embeddings, bool):
        found.append(f"tie_word_embeddings must be true or false, not {shown(config.tie_word_embeddings)}")
    found += _long_rope_problems(config, config.long_rope) if config.long_rope else []
    return found or _angle_problems(config)


def _llama_problems(config: Phi3Config) -> list[str]:
    found = []
    if config.rotary_dim != config.head_dim:
        found.append(f"it rotates {config.rotary_dim} of {config.head_dim} dimensions of a head, Llama all of them")
    if config.long_rope is not None:
        found.append("it has factors for its rotary frequencies (LongRoPE, llama3, linear), which are not written so")
    if config.sliding_window is None and config.hidden_size % config.num_attention_heads:
        found.append(f"its width {config.hidden_size} is not a multiple of its {config.num_attention_heads} heads")
    return found


def _angle_problems(config: Phi3Config) -> list[str]:
    """Whether rotary angles and wavelengths are finite in float32: with tiny or huge numbers they are not."""
    divisors = (*config.long_rope.short_factor, *config.long_rope.long_factor) if config.long_rope else (1.0,)
    longest = max(1, config.rope_theta) * max(divisors)
    if config.max_position_embeddings * max(1, 1 / config.rope_theta) / min(divisors) > LARGEST or longest > LARGEST:
        return [f"rope_theta={config.rope_theta} and the rope factors give angles that are no numbers in float32"]
    return []


def _long_rope_problems(config: Phi3Config, rope: LongRope) -> list[str]:
    found = []
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if not isinstance(factors, tuple) or len(factors) != config.rotary_dim // 2:
            length = len(factors) if isinstance(factors, tuple) else shown(factors)
            found.append(f"LongRoPE {name} must list rotary_dim/2 = {config.rotary_dim // 2} numbers, not {length}")
        elif not all(is_number(value) and value > 0 for value in factors):
            found.append(f"LongRoPE {name} must hold positive numbers {_IN_FLOAT32} only")
    if not _is_count(rope.original_max_position_embeddings) or rope.original_max_position_embeddings < 2:
        found.append(
            "original_max_position_embeddings must be an integer from 2 to below 2**31, not "
            f"{shown(rope.original_max_position_embeddings)}"
        )
    for name in ("factor", "attention_factor"):
        value = getattr(rope, name)
        if value is not None and not (is_number(value) and value > 0):
            found.append(f"LongRoPE {name} must be a positive number {_IN_FLOAT32} or absent, not {shown(value)}")
    return found


def _parse(raw: Mapping[str, Any]) -> Phi3Config:
    raw = dict(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise ValueError(f"model_type is {shown(model_type)}, but only these can be loaded: {', '.join(DEFAULTS)}")
    raw = _with_defaults(raw, DEFAULTS[model_type])
    for key, allowed in FIXED_KEYS.items():
        if (value := raw.pop(key, allowed[0])) not in allowed:
            raise ValueError(f"{key}={shown(value)} is not supported, only {allowed[0]!r} is implemented")
    named = [raw.pop(key, None) for key in ("quantization_config", "quantization")]  # MLX writes the second, too
    if (quantization := next((each for each in named if each is not None), None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        method = method or "MLX or another program"
        raise ValueError(
            f"quantization_config: weights that were quantised by {shown(method)} cannot be read; load the checkpoint "
            "that they were made from, and quantise it here (quantize=..., or phi3-quantize)"
        )
    _drop_what_has_no_effect(raw, model_type)
    rope, theta, partial = rope_keys(raw)
    top, nested = (where.pop("original_max_position_embeddings", None) for where in (raw, rope))
    fields = {field.name: raw.pop(field.name) for field in dataclasses.fields(Phi3Config) if field.name in raw}
    unknown = sorted(key for key in raw if not is_inert(key) and raw[key] is not None)  # null: the default
    if unknown:
        known = [field.name for field in dataclasses.fields(Phi3Config)]
        raise ValueError(
            f"unsupported keys {shown(unknown)}; they may change what the model computes: remove them only if you "
            f"know that they do not{did_you_mean(unknown[0], known)}"
        )
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("head_dim") is None:
        fields["head_dim"] = _derived_head_dim(fields["hidden_size"], fields["num_attention_heads"])
    rows = fields["vocab_size"]
    for name in ("bos_token_id", "pad_token_id"):
        token: Any = fields.get(name)
        # Old conversions of Llama have -1 for none, and a bos behind a vocabulary that was cut.
        if _is_int(token) and (token < 0 or (name == "bos_token_id" and _is_int(rows) and token >= rows)):
            warnings.warn(
                f"config.json: {name}={shown(token)} is no token of the vocabulary: taken as none", stacklevel=4
            )
            fields[name] = None
    eos = fields.get("eos_token_id")
    fields["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    fields["rope_theta"] = 10000.0 if theta is None else theta
    if partial is not None:
        fields["partial_rotary_factor"] = partial
        if model_type != "phi3" and partial != 1:
            raise ValueError(f"partial_rotary_factor={shown(partial)} is not defined for model_type {model_type!r}")
    plain = Phi3Config(**fields)  # checks the sizes
    default = DEFAULTS[model_type].get("original_max_position_embeddings", plain.max_position_embeddings)
    # As in transformers, the value at the top level takes precedence over the one among the rope parameters.
    original = next((value for value in (top, nested) if value is not None), default)
    long_rope = _long_rope(rope, original, plain, model_type)
    if long_rope is not None and model_type == "phi3" and top is None and original != default:
        warnings.warn(
            f"config.json: original_max_position_embeddings={shown(original)} stands among the rope parameters only, "
            f"where transformers' Phi-3 does not read it (it would take {default}); put it at the top level, too",
            stacklevel=4,
        )
    return dataclasses.replace(plain, long_rope=long_rope)


def _with_defaults(raw: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Absent keys have the defaults of their class; but an id that the vocabulary does not have is none."""
    filled = {key: value for key, value in defaults.items() if key != "original_max_position_embeddings"} | raw
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in raw and _is_count(filled["vocab_size"]) and filled.get(name, 0) >= filled["vocab_size"]:
            del filled[name]
    return filled


def _drop_what_has_no_effect(raw: dict[str, Any], model_type: str) -> None:
    """Removes keys that change no logit of the reference's, with a warning where a reader could think otherwise."""
    for key in DROPOUT_KEYS:
        if rate := raw.pop(key, None):
            warnings.warn(
                f"config.json: {key}={shown(rate)} is not applied when training here; it changes no logit", stacklevel=5
            )
    if model_type == "llama" and (window := raw.pop("sliding_window", None)) is not None:
        warnings.warn(
            f"config.json: sliding_window={shown(window)} is left out, as in transformers: a llama has none (a mistral "
            "has)",
            stacklevel=5,
        )
    kind = "full_attention" if raw.get("sliding_window") is None else "sliding_attention"
    layer_types = raw.pop("layer_types", None) or []
    if not isinstance(layer_types, list) or any(each != kind for each in layer_types):
        raise ValueError(f"layer_types={shown(layer_types)} is not supported: here all of them would be {kind!r}")


def _long_rope(rope: dict[str, Any], original: Any, config: Phi3Config, model_type: str) -> LongRope | None:
    """The rope dictionary, without theta and the share that is rotated, of a model with this configuration."""
    kinds = {str(rope.pop(key)) for key in ("type", "rope_type") if key in rope} or {"default"}
    kinds = {"longrope" if model_type == "phi3" and kind in LONG_ROPE_NAMES else kind for kind in kinds}
    rope = {key: value for key, value in rope.items() if key not in INERT_ROPE_KEYS}
    known = {"default": (), "longrope": ("short_factor", "long_factor", "factor", "attention_factor")}
    if model_type != "phi3":
        known |= {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if len(kinds) > 1 or not kinds <= known.keys():
        raise ValueError(
            f"rope type {shown(sorted(kinds))} is not supported; known for {model_type} are {', '.join(known)}"
            + (", su and yarn" if model_type == "phi3" else "")
        )
    (kind,) = kinds
    if unknown := sorted(rope.keys() - set(known[kind])):
        raise ValueError(f"unsupported rope keys {shown(unknown)} for rope type {kind!r}")
    if kind == "default":
        return None
    if kind != "longrope":
        divisors = rope_divisors(kind, rope, original, config.rope_theta, config.rotary_dim)
        same = all(divisor == 1 for divisor in divisors)
        return None if same else LongRope(divisors, divisors, config.max_position_embeddings, attention_factor=1.0)
    missing = [key for key in ("short_factor", "long_factor") if not isinstance(rope.get(key), list)]
    if missing:
        raise ValueError(f"LongRoPE needs lists of numbers in {missing}")
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
        raise ValueError(f"hidden_size={shown(hidden_size)} cannot be split into num_attention_heads={shown(heads)}")
    return int(hidden_size) // int(heads)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return is_whole(value, 1)

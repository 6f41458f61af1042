"""The sampling settings: `Sampling` is what a user writes for one answer, `SamplingArrays` the same as arrays, for a
batch of rows.

Axis letters: B batch, E entries of a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.json_files import shown

# Lists of ids are padded to a power of two, and to at least this, so that most batches run the same program.
_SMALLEST_LIST = 8
_TINY, _HUGE = 1e-30, 1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to pick the tokens of one answer. Raises ValueError for numbers that make no sense.

    Attributes:
      temperature: 0 takes the most likely token; larger values draw from softmax(logits / temperature).
      top_k: draw from the k most likely tokens. This and the next three need a temperature above 0.
      top_p: draw from the fewest most likely tokens whose probabilities add up to this, in (0, 1].
      min_p: draw from tokens at least this fraction as likely as the most likely one, in [0, 1].
      typical_p: draw from the tokens of most typical surprise whose probabilities add up to this, in (0, 1].
      repetition_penalty: divides the logits of tokens in prompt and answer; 1 is off.
      presence_penalty: subtracted from the logits of tokens in the answer, in [-2, 2].
      frequency_penalty: the same, once for each time a token occurs, in [-2, 2].
      logit_bias: token id -> what to add to its logit.
      banned_tokens: ids that are never picked, unless they are forced.
      forced_tokens: ids that the answer begins with.
      no_repeat_ngram_size: no sequence of this many tokens occurs twice in prompt and answer; 0 is off.
      min_new_tokens: the answer does not end before it has this many tokens.
      seed: of the random draws, in [0, 2**32). Rows with the same seed, prompt and settings get the same answer.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    banned_tokens: Sequence[int] = ()
    forced_tokens: Sequence[int] = ()
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, good: Callable[[Any], bool], range_: str) -> None:
            if (value := getattr(self, name)) is not None and not good(value):
                raise ValueError(f"{name}={shown(value)} must be {range_}")

        # Numbers beyond these would be 0 or infinite in float32, or make logits so.
        check("temperature", lambda x: x == 0 or _TINY <= x <= _HUGE, "0 (greedy) or a positive number, 1e-30 to 1e30")
        check("top_k", lambda x: _is_count(x) and x > 0, "a whole number of at least 1 and below 2**31, or None")
        for name in ("top_p", "typical_p"):
            check(name, lambda x: _TINY <= x <= 1, "in (0, 1] and at least 1e-30, or None")
        check("min_p", lambda x: 0 <= x <= 1, "in [0, 1], or None")
        check("repetition_penalty", lambda x: _TINY <= x <= _HUGE, "a positive number, 1e-30 to 1e30")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, lambda x: -2 <= x <= 2, "in [-2, 2]")
        for name in ("banned_tokens", "forced_tokens", "logit_bias"):
            check(name, lambda ids: all(map(_is_count, ids)), "token ids of at least 0 and below 2**31")
        check(
            "logit_bias",
            lambda bias: all(abs(x) <= _HUGE for x in bias.values()),
            "of finite numbers; ban tokens instead",
        )
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            check(name, _is_count, "a whole number of at least 0 and below 2**31")
        check("seed", lambda x: _is_count(x, 2**32), "a whole number in [0, 2**32)")

    def tokens_outside(self, vocab_size: int) -> list[int]:
        """The token ids that are named here and are not in the vocabulary."""
        named = [*self.logit_bias, *self.banned_tokens, *self.forced_tokens]
        return [token for token in named if token >= vocab_size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` of every row, as arrays [B] or, for lists of ids padded with -1, [B, E]; in brackets the "off" value.

    Attributes:
      temperature: float32 (0: greedy).
      top_k: int32 (0).
      top_p, typical_p: float32 (1).
      min_p: float32 (0).
      repetition_penalty: float32 (1).
      presence_penalty, frequency_penalty: float32 (0).
      bias_ids, bias: int32 and float32 [B, E] (-1 and 0).
      banned, forced: int32 [B, E] (-1).
      no_repeat_ngram_size, min_new_tokens: int32 (0).
      seed: uint32.
      allowed: uint32 [B, W], what grammars allow as the next token (`grammar.unpack`), a bit each; None: anything.
      plain: no row asks for anything, so that the program for it need not look. Always False on the CPU, where one
        program serves all settings and looks when it runs.
      longest_ngram: no no_repeat_ngram_size is larger, as far as the program is to know; None on the CPU.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    banned: jax.Array
    forced: jax.Array
    no_repeat_ngram_size: jax.Array
    min_new_tokens: jax.Array
    seed: jax.Array
    allowed: jax.Array | None = None
    plain: bool = dataclasses.field(default=False, metadata={"static": True})
    longest_ngram: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls, rows: Sequence[Sampling], vocab_size: int, biases: int = _SMALLEST_LIST, listed: int = _SMALLEST_LIST
    ) -> SamplingArrays:
        """The arrays for a batch. Raises ValueError for token ids that are not in the vocabulary.

        Args:
          biases, listed: the least entries E of the arrays for logit_bias, and of those for lists.
        """
        for i, row in enumerate(rows):
            if outside := row.tokens_outside(vocab_size):
                raise ValueError(f"row {i} names tokens {outside[:5]} outside of the vocabulary of {vocab_size}")

        def column(name: str, off: float, dtype: Any) -> jax.Array:
            values = [getattr(row, name) for row in rows]
            return jnp.asarray([off if value is None else value for value in values], dtype)

        on_cpu = jax.default_backend() == "cpu"
        plain = not on_cpu and all(map(_is_plain, rows))
        ngrams = _list_size(max((row.no_repeat_ngram_size for row in rows), default=0))
        return cls(
            temperature=column("temperature", 0, jnp.float32),
            top_k=jnp.asarray([min(row.top_k or 0, vocab_size) for row in rows], jnp.int32),
            top_p=column("top_p", 1, jnp.float32),
            min_p=column("min_p", 0, jnp.float32),
            typical_p=column("typical_p", 1, jnp.float32),
            repetition_penalty=column("repetition_penalty", 1, jnp.float32),
            presence_penalty=column("presence_penalty", 0, jnp.float32),
            frequency_penalty=column("frequency_penalty", 0, jnp.float32),
            bias_ids=_padded([list(row.logit_bias) for row in rows], -1, np.int32, biases),
            bias=_padded([list(row.logit_bias.values()) for row in rows], 0, np.float32, biases),
            banned=_padded([row.banned_tokens for row in rows], -1, np.int32, listed),
            forced=_padded([row.forced_tokens for row in rows], -1, np.int32, listed),
            no_repeat_ngram_size=column("no_repeat_ngram_size", 0, jnp.int32),
            min_new_tokens=column("min_new_tokens", 0, jnp.int32),
            seed=column("seed", 0, jnp.uint32),
            plain=plain,
            longest_ngram=None if on_cpu else ngrams,
        )

    def by_grammar(self, allowed: jax.Array) -> SamplingArrays:
        """The same where grammars allow only some tokens."""
        return dataclasses.replace(self, allowed=allowed, plain=False)

    def for_any(self) -> SamplingArrays:
        """The same for the program that serves all settings."""
        return dataclasses.replace(self, plain=False)


def _is_plain(row: Sampling) -> bool:
    """Whether a row's token is always the largest of the model's own logits."""
    penalties = row.repetition_penalty - 1, row.presence_penalty, row.frequency_penalty
    lists = map(len, (row.logit_bias, row.banned_tokens, row.forced_tokens))
    return not any((row.temperature, *penalties, *lists, row.no_repeat_ngram_size, row.min_new_tokens))


def _is_count(value: Any, end: int = 2**31) -> bool:
    return isinstance(value, int | np.integer) and bool(0 <= value < end)


def _list_size(longest: int, least: int = _SMALLEST_LIST) -> int:
    return max(least, 1) if longest <= least else 1 << max(longest - 1, 0).bit_length()


def _padded(rows: Sequence[Sequence[float]], padding: int, dtype: Any, least: int) -> jax.Array:
    """Lists of different lengths -> [B, E], with E at least `least`."""
    array = np.full((len(rows), _list_size(max(map(len, rows), default=0), least)), padding, dtype)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return jnp.asarray(array)

"""One function for each way of changing the next token's logits before it is picked.

All take float32 logits [B, V] first and return new ones; every parameter has one value for each row, so that rows of
one batch may differ. A parameter at its "off" value leaves its row exactly as it was. A token with a logit of -inf
cannot be picked. The results are those of the class in transformers' module generation.logits_process, if it has one.
pick.py calls the functions in the right order.

Axis letters: B batch, V vocab, S history (prompt and answer so far, padded on the right), E entries of a list.
Lists of ids are padded with -1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_INFINITY = 0x7F800000  # the bits of this float
_UNROLLED = 8  # turns of a loop that are compiled as one, where it is known how many there are
# How many bits of a number each look at the logits finds on an accelerator, with up to _FEW logits and with more. Looks
# at few take less time than launching them: 8 at 15 places beat 16 at 3. Many are read anew for each place.
_BITS_OF_FEW, _BITS_OF_MANY, _FEW = 4, 2, 1 << 19

# Processors that depend on the text so far.


def penalise_repetition(logits: jax.Array, penalty: jax.Array, history: jax.Array, lengths: jax.Array) -> jax.Array:
    """Makes every token of the prompt and the answer less likely: logit / penalty, or * penalty below zero.

    From "CTRL" (Keskar et al. 2019), section 4.1.

    Args:
      penalty: float32 [B], above 0; 1 is off, below 1 rewards repetition.
      history: int32 [B, S].
      lengths: int32 [B]: how many ids of a row of `history` are real.
    """
    ids = jnp.where(jnp.arange(history.shape[1]) < lengths[:, None], history, -1)
    old = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=1)
    new = jnp.where(old < 0, old * penalty[:, None], old / penalty[:, None])
    # Set rather than scaled: a token that occurs twice is penalised once.
    return _set(logits, ids, new)


def penalise_presence_and_frequency(
    logits: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
) -> jax.Array:
    """logit - presence * (count > 0) - frequency * count, as OpenAI's API defines it: only the answer is counted.

    Args:
      presence, frequency: float32 [B]; 0 is off, negative values reward repetition.
      history, lengths: as in `penalise_repetition`.
      prompt_lengths: int32 [B]: how many ids of a row belong to the prompt.
    """
    slots = jnp.arange(history.shape[1])
    ids = jnp.where((slots >= prompt_lengths[:, None]) & (slots < lengths[:, None]), history, -1)
    counts = jnp.zeros_like(logits).at[_where(ids, logits)].add(1.0, mode="drop")
    return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts


def forbid_repeated_ngrams(
    logits: jax.Array, size: jax.Array, history: jax.Array, lengths: jax.Array, longest: int | None = None
) -> jax.Array:
    """Forbids each token that would complete a sequence of `size` tokens which the history already has.

    Args:
      size: int32 [B]; 0 is off, 1 forbids every token seen so far.
      history, lengths: as in `penalise_repetition`.
      longest: no size that can occur is larger: the loop's length is known to the compiler then. None: it follows
        `size` when the program runs.
    """
    slots = jnp.arange(history.shape[1])

    def compare(back: jax.Array, matches: jax.Array) -> jax.Array:
        newest = jnp.take_along_axis(history, jnp.maximum(lengths - back, 0)[:, None], axis=1)
        return matches & ((jnp.roll(history, back, axis=1) == newest) | (back >= size[:, None]))

    # A slot matches if the size - 1 tokens before it equal the newest size - 1; it needs that many before it.
    complete = (slots >= size[:, None] - 1) & (slots < lengths[:, None]) & (size[:, None] > 0)
    if longest is None:
        matches = jax.lax.fori_loop(1, size.max(), compare, complete)
    else:
        # No sequence is longer than the history.
        turns = min(longest, history.shape[1]) - 1
        matches = jax.lax.fori_loop(1, turns + 1, compare, complete, unroll=max(1, min(turns, _UNROLLED)))
    return forbid(logits, jnp.where(matches, history, -1))


# Processors for given tokens.


def add_bias(logits: jax.Array, ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds bias (float32 [B, E]) to the logits of `ids` (int32 [B, E], no id twice in a row)."""
    return logits.at[_where(ids, logits)].add(bias, mode="drop")


def forbid(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Forbids the tokens `ids`, int32 [B, E]."""
    return _set(logits, ids, jnp.float32(-jnp.inf))


def forbid_early_end(logits: jax.Array, minimum: jax.Array, generated: jax.Array, end_ids: jax.Array) -> jax.Array:
    """Forbids the ends (int32 [E], the same for all rows) while a row has fewer than `minimum` new tokens.

    Args:
      minimum: int32 [B]; 0 is off.
      generated: int32 [B]: how many new tokens a row has.
    """
    return forbid(logits, jnp.where((generated < minimum)[:, None], end_ids, -1))


def force(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Leaves only `token` (int32 [B]; -1 is off), whatever its logit was."""
    forced = jnp.where(jnp.arange(logits.shape[1]) == token[:, None], jnp.float32(0), -jnp.inf)
    return jnp.where(token[:, None] < 0, logits, forced)


# Processors that shape the distribution to draw from.


def apply_temperature(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """logits / temperature, float32 [B], above 0; 1 is off."""
    return logits / temperature[:, None]


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k (int32 [B]; 0 is off) most likely tokens, and all that are as likely as the last of them."""
    wanted = jnp.where(k > 0, k, logits.shape[1])
    kth = _smallest_float(
        lambda value: (_beside(logits, value) > value[..., None]).sum(axis=-1) < _beside(wanted, value), logits.shape
    )
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest most likely tokens whose probabilities add up to p (float32 [B]; 1 is off), at least one.

    "The Curious Case of Neural Text Degeneration" (Holtzman et al. 2020). Of equally likely tokens the smaller ids are
    kept first, so that a tiny p is greedy; transformers keeps as many, but an unstable sort decides which.
    """
    probs = jax.nn.softmax(logits, axis=1)
    spare = 1 - p  # the least likely tokens go as long as their probabilities add up to no more than this

    def mass(tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens, _beside(probs, tokens[..., 0]), 0).sum(axis=-1)

    last = _smallest_float(
        lambda value: mass(_beside(logits, value) <= value[..., None]) > _beside(spare, value), logits.shape
    )
    # Rounding may leave the total below `spare`, when p is tiny.
    last = jnp.minimum(last, logits.max(axis=1, keepdims=True))
    tied = logits == last
    each = jnp.where(tied, probs, 0).max(axis=1)
    going = jnp.floor((spare - mass(logits < last)) / each).astype(jnp.int32)
    staying = jnp.maximum(tied.sum(axis=1) - going, 1)
    slots = jnp.arange(logits.shape[1])
    stays = _smallest(
        lambda slot: (_beside(tied, slot) & (slots <= slot[..., None])).sum(axis=-1) >= _beside(staying, slot),
        0,
        logits.shape[1] - 1,
        logits.shape,
    )[:, None]
    kept = (logits > last) | (tied & (slots <= stays)) | (p[:, None] >= 1)
    return jnp.where(kept, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the tokens that are at least p (float32 [B]; 0 is off) times as likely as the most likely one."""
    relative = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return jnp.where(relative < p[:, None], -jnp.inf, logits)


def keep_typical_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the tokens whose surprise (-log p) is nearest to the entropy, until their probabilities add up to p.

    "Locally Typical Sampling" (Meister et al. 2023). May remove the most likely token.

    Args:
      p: float32 [B]; 1 is off.
    """
    surprise = -jax.nn.log_softmax(logits, axis=1)
    probs = jnp.exp(-surprise)
    entropy = jnp.where(probs > 0, surprise * probs, 0).sum(axis=1, keepdims=True)
    distance = jnp.abs(surprise - entropy)

    def is_enough(value: jax.Array) -> jax.Array:
        nearer = _beside(distance, value) <= value[..., None]
        return jnp.where(nearer, _beside(probs, value), 0).sum(axis=-1) >= _beside(p, value)

    bound = _smallest_float(is_enough, logits.shape)
    return jnp.where((distance > bound) & (p[:, None] < 1), -jnp.inf, logits)


# Helpers.


def _where(ids: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of ids [B, E] in the logits, for `.at[...]` with mode="drop"."""
    # An index of -1 would mean the last token: past the end it is dropped.
    return jnp.arange(len(ids))[:, None], jnp.where(ids < 0, logits.shape[1], ids)


def _set(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    return logits.at[_where(ids, logits)].set(values, mode="drop")


def _beside(x: jax.Array, places: jax.Array) -> jax.Array:
    """x [B, ...], with an axis for each that `places` [B] or [B, P] has after the first."""
    return jnp.expand_dims(x, range(1, places.ndim))


def _smallest(holds: Callable[[jax.Array], jax.Array], low: int, high: int, shape: tuple[int, ...]) -> jax.Array:
    """The smallest integer in [low, high] from which on `holds` is true, int32 [B]; `high` if none is.

    Sorting the tokens is slower. The bisection of the CPU looks at all of them up to 32 times, and ends when it can.
    Elsewhere its end would be a decision of the host, and launching may take longer than looking: there each look is at
    several places, and how many looks there are is known when the program is compiled. Both find the same.

    Args:
      holds: int32 [B] or [B, P] -> bool of the same shape.
      shape: B and V.
    """
    if jax.default_backend() != "cpu":
        return _smallest_by_digits(holds, low, high, shape)

    def halve(interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their sum may overflow
        true = holds(middle)
        return jnp.where(true | (low == high), low, middle + 1), jnp.where(true, middle, high)

    ends = jnp.full(shape[0], low, jnp.int32), jnp.full(shape[0], high, jnp.int32)
    return jax.lax.while_loop(lambda interval: (interval[0] < interval[1]).any(), halve, ends)[1]


def _smallest_by_digits(
    holds: Callable[[jax.Array], jax.Array], low: int, high: int, shape: tuple[int, ...]
) -> jax.Array:
    """`_smallest`, from the highest digit of its distance from `low` to the lowest."""
    bits = _BITS_OF_FEW if shape[0] * shape[1] <= _FEW else _BITS_OF_MANY
    farthest = jnp.uint32(high - low)

    def at(distance: jax.Array) -> jax.Array:
        # Wraps around as it should: the distance may need all 32 bits.
        return jax.lax.bitcast_convert_type(jnp.minimum(distance, farthest) + jnp.uint32(low % 2**32), jnp.int32)

    distance = jnp.zeros(shape[0], jnp.uint32)
    digits = -(-(high - low).bit_length() // bits)
    for digit in reversed(range(digits)):
        # A value of the digit stands for a stretch of numbers. If `holds` is false at its last, the digit is larger.
        stretches = (jnp.arange(1, 1 << bits, dtype=jnp.uint32) << (bits * digit)) - 1
        larger = (~holds(at(distance[:, None] + stretches))).sum(axis=1, dtype=jnp.uint32)
        distance += larger << (bits * digit)
    return at(distance)


def _smallest_float(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Like `_smallest`, but over all floats, as [B, 1]: floats are ordered like their (flipped) bits."""

    def value(order: jax.Array) -> jax.Array:
        bits = jnp.where(order < 0, order ^ 0x7FFFFFFF, order)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return value(_smallest(lambda order: holds(value(order)), -_INFINITY - 1, _INFINITY, shape))[:, None]

"""From logits to the next token, for a batch whose rows may have different settings.

`pick` picks one token per row. The settings are in params.py.

The order is that of transformers' `generate`:

1. what a grammar allows; bias, repetition, presence and frequency penalties, no repeated n-grams, banned tokens, early
   ends, forced tokens;
2. temperature, top-k, top-p, min-p, typical-p, each on what the one before has left, and only for rows that draw.

Biases and penalties come before bans, so that nothing lifts a ban; forcing is last, and overrides a ban. Temperature
comes before top-k and the like, so that these see the probabilities that are drawn from. transformers has no presence
and frequency penalties; here they follow the repetition penalty.

Axis letters: B batch, V vocab, S history, E end ids, N the most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import processors
from .grammar import unpack
from .params import SamplingArrays

_Step = tuple[jax.Array, Callable[[jax.Array], jax.Array]]  # whether it is wanted, bools; a function of the logits


def pick(
    logits: jax.Array,
    params: SamplingArrays,
    history: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
    end_ids: jax.Array,
) -> jax.Array:
    """The next token of every row: int32 [B].

    A row's draw depends on its seed and on how many tokens it has generated, not on its place in the batch. Of equally
    likely tokens a greedy row takes the one with the smallest id. -1 for a row that has none to take: all tokens are
    forbidden, or the largest number is NaN or infinite. Arguments as in `process`.
    """
    logits = jax.lax.stop_gradient(logits)  # a choice has none
    if params.plain:
        return _argmax(logits)
    adjusted = _adjust(logits, params, history, lengths, prompt_lengths, end_ids)

    def draw() -> jax.Array:
        def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[1:], jnp.float32)

        # The largest of logit + Gumbel noise is a draw from the softmax.
        noisy = _shape(adjusted, params) + jax.vmap(noise)(params.seed, lengths - prompt_lengths)
        return _argmax(jnp.where(params.temperature[:, None] > 0, noisy, adjusted))

    if _skips():
        return jax.lax.cond((params.temperature > 0).any(), draw, lambda: _argmax(adjusted))
    return draw()


def pick_places(
    logits: jax.Array,
    params: SamplingArrays,
    history: jax.Array,
    places: jax.Array,
    prompt_lengths: jax.Array,
    end_ids: jax.Array,
) -> jax.Array:
    """The tokens int32 [B, J] for J places of each row, by logits [B, J, V], picked as if each were the only one.

    `places`, int32 [B, J], are lengths of the history: each pick sees so much of it. Other arguments as in `process`.
    """
    rows, J, _ = logits.shape

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, J, axis=0)

    picks = pick(
        logits.reshape(rows * J, -1),
        jax.tree.map(spread, params),
        spread(history),
        places.reshape(-1),
        spread(prompt_lengths),
        end_ids,
    )
    return picks.reshape(rows, J)


def process(
    logits: jax.Array,
    params: SamplingArrays,
    history: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
    end_ids: jax.Array,
) -> jax.Array:
    """The logits [B, V] that `pick` draws from, or takes the largest of; the module's docstring has the order.

    On the CPU steps that no row needs are skipped when the program runs, so that one compiled program serves all
    settings. (Under `jax.vmap` all steps would run: call it with a batch.) Elsewhere such a decision would wait for the
    host. There are two programs there, as `SamplingArrays.plain` tells: one with no step, and one with all of them.

    Args:
      logits: float32 [B, V].
      history: int32 [B, S]: prompt and answer so far, padded on the right with anything.
      lengths: int32 [B]: how many ids of a row of `history` are real.
      prompt_lengths: int32 [B]: how many of these are the prompt.
      end_ids: int32 [E]: the ids that end an answer, the same for all rows.
    """
    if params.plain:
        return logits
    return _shape(_adjust(logits, params, history, lengths, prompt_lengths, end_ids), params)


def top_logprobs(logits: jax.Array, chosen: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the chosen token and of the n most likely ones.

    Give it the model's own logits, from before `process`, to report what OpenAI's API reports: the log-probabilities
    without bans and penalties.

    Args:
      logits: float32 [..., V].
      chosen: int32 [...].

    Returns:
      (float32 [...] of the chosen, int32 [..., N] ids, float32 [..., N] their values, falling).
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(logprobs, n)
    return jnp.take_along_axis(logprobs, chosen[..., None], axis=-1)[..., 0], ids, values


def _adjust(
    logits: jax.Array,
    params: SamplingArrays,
    history: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
    end_ids: jax.Array,
) -> jax.Array:
    """Part 1 of the order: the steps that also change a greedy row."""
    generated = lengths - prompt_lengths
    presence, frequency = params.presence_penalty, params.frequency_penalty
    ngram = params.no_repeat_ngram_size
    forced = jnp.where(jnp.arange(params.forced.shape[1]) == generated[:, None], params.forced, -1).max(axis=1)
    return _apply(
        logits,
        *_by_grammar(params.allowed),
        (params.bias_ids >= 0, lambda x: processors.add_bias(x, params.bias_ids, params.bias)),
        (
            params.repetition_penalty != 1,
            lambda x: processors.penalise_repetition(x, params.repetition_penalty, history, lengths),
        ),
        (
            (presence != 0) | (frequency != 0),
            lambda x: processors.penalise_presence_and_frequency(
                x, presence, frequency, history, lengths, prompt_lengths
            ),
        ),
        (
            ngram > 0,
            lambda x: processors.forbid_repeated_ngrams(x, ngram, history, lengths, params.longest_ngram),
        ),
        (params.banned >= 0, lambda x: processors.forbid(x, params.banned)),
        (
            generated < params.min_new_tokens,
            lambda x: processors.forbid_early_end(x, params.min_new_tokens, generated, end_ids),
        ),
        (forced >= 0, lambda x: processors.force(x, forced)),
    )


def _by_grammar(allowed: jax.Array | None) -> list[_Step]:
    """The step, if there is one, that leaves only what grammars allow."""
    if allowed is None:
        return []
    return [(~allowed != 0, lambda x: jnp.where(unpack(allowed, x.shape[1]), x, -jnp.inf))]


def _shape(logits: jax.Array, params: SamplingArrays) -> jax.Array:
    """Part 2 of the order; greedy rows stay as they are."""

    def drawing(values: jax.Array, off: float) -> jax.Array:
        return jnp.where(params.temperature > 0, values, jnp.asarray(off, values.dtype))

    temperature, top_k = drawing(params.temperature, 1), drawing(params.top_k, 0)
    top_p, min_p, typical_p = drawing(params.top_p, 1), drawing(params.min_p, 0), drawing(params.typical_p, 1)
    return _apply(
        logits,
        (temperature != 1, lambda x: processors.apply_temperature(x, temperature)),
        (top_k > 0, lambda x: processors.keep_top_k(x, top_k)),
        (top_p < 1, lambda x: processors.keep_top_p(x, top_p)),
        (min_p > 0, lambda x: processors.keep_min_p(x, min_p)),
        (typical_p < 1, lambda x: processors.keep_typical_p(x, typical_p)),
    )


def _apply(logits: jax.Array, *steps: _Step) -> jax.Array:
    """Runs the steps in order; `_skips` those that no row wants."""
    if not _skips():
        for _, step in steps:
            logits = step(logits)
        return logits
    wanted = jnp.stack([flags.any() for flags, _ in steps])

    def run(logits: jax.Array) -> jax.Array:
        for (_, step), want in zip(steps, wanted, strict=True):
            logits = jax.lax.cond(want, step, lambda x: x, logits)
        return logits

    # A step that is skipped may still copy the logits; this skips all copies but one.
    return jax.lax.cond(wanted.any(), run, lambda x: x, logits)


def _skips() -> bool:
    """Whether the program is for a processor that decides for itself, while it runs, what to leave out."""
    return jax.default_backend() == "cpu"


def _argmax(logits: jax.Array) -> jax.Array:
    """The smallest id of the largest logit, int32 [B]; -1 if that is not finite."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    if _skips():  # two loops over all logits, on CPUs faster than jnp.argmax
        largest = logits.max(axis=1, keepdims=True)
        first = jnp.where(logits == largest, ids, logits.shape[1] - 1).min(axis=1)
        return jnp.where(jnp.isfinite(largest[:, 0]), first, -1)

    def better(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # NaN is better than any number, so that it is seen.
        first = (one[0] > other[0]) | jnp.isnan(one[0]) | ((one[0] == other[0]) & (one[1] < other[1]))
        return jnp.where(first, one[0], other[0]), jnp.where(first, one[1], other[1])

    pairs = logits, jnp.broadcast_to(ids, logits.shape)
    largest, first = jax.lax.reduce(pairs, (jnp.float32(-jnp.inf), jnp.int32(logits.shape[1])), better, (1,))
    return jnp.where(jnp.isfinite(largest), first, -1)

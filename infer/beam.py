"""Beam search: finds the few answers of each prompt that are most likely as a whole, not token by token.

    begin -> read, read, ... -> start -> choose -> search_on   (back to read where LongRoPE's border is crossed)

Each prompt has W unfinished answers, the beams. At each step all continuations of all beams by one token are compared:
the W best that do not end are the new beams, and those that end are kept as finished. The functions of
engine/decoding.py run the beams as independent rows of a batch; `choose` compares them.

The rules are those of transformers' `generate(num_beams=W, do_sample=False)`. The answers of a prompt do not depend on
the other prompts of the batch.

Axis letters: B prompt, W beam, R = B x W rows (a prompt's beams side by side), C candidates of a prompt, E end ids,
M tokens of prompt and answer together, D model, V vocab, L layer, K key-value heads, S cache slot, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.model import KVCache, Params, Phi3, slots_needed

from .answer import Answer
from .engine import NewTokens, Options, decoding
from .engine.buckets import own_cache_dtype, room_rung
from .engine.decoding import DecodeState, Settings
from .engine.failures import NOT_FINITE, explain, is_finite
from .engine.prefill import Prefill
from .prompts import Prompt, as_list, check_batch, encode_prompt, for_each
from .sampling import Sampling, SamplingArrays

_RESPECTED = ("prefill_chunk", "cache_dtype", "rope_policy", "room")
MOST_BEAMS = 256  # each is a row with a cache of its own
_LARGEST_EXPONENT = 60  # scores are divided by at most e**60: float32 overflows at e**88


@dataclasses.dataclass(frozen=True)
class Beam:
    """One finished answer.

    Attributes:
      text: the decoded new tokens, without special tokens.
      token_ids: the new tokens, with the end token if there is one.
      score: the sum of their log-probabilities, divided by (number of new tokens) ** length_penalty.
      finish_reason: "stop" for an end token, "length" for a limit reached (max_new_tokens, or the model's context),
        "error" if the search could not go on; there is no answer then, and the score is -inf.
      error: with finish_reason "error": why, and what to do about it; else None.
    """

    text: str
    token_ids: list[int]
    score: float
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None


def beam_search(
    checkpoint: Checkpoint,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 32,
    beams: int = 4,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    answers: int = 1,
    options: Options | None = None,
) -> list[list[Beam]]:
    """Searches for the most likely answers.

    A step runs R rows, and then copies the whole cache [L, R, K, S, H] into the order of the new beams. The copy takes
    memory for a second cache and, for the demo on the CPU, a tenth (160 slots) to a fifth (1152 slots) of a step.

    Args:
      prompts, max_new_tokens: as in `generate`.
      beams: W, the number of beams of each prompt, MOST_BEAMS at most; 1 is greedy decoding.
      length_penalty: sums of log-probabilities are divided by the length to this power: 0 compares the sums, 1 the
        means, larger numbers prefer longer answers, negative ones shorter answers.
      early_stopping: True ends a prompt's search once W answers have finished. False goes on while the best beam, if it
        ended now, would beat the worst of these.
      answers: how many answers of each prompt to return, at most W.
      options: prefill_chunk, cache_dtype, room, and rope_policy "length" or "capacity"; nothing else may be set.

    Returns:
      for each prompt its best answers, best first; fewer than `answers` only if no more exist, in a tiny vocabulary, or
      if the model's logits are not finite numbers: then one with finish_reason "error". The other prompts go on.

    Raises:
      ValueError: as in `generate`; options that are not for beam search; a number makes no sense.
    """
    options = options or Options()
    ids = [encode_prompt(checkpoint, prompt) for prompt in as_list(prompts)]
    limits = for_each(max_new_tokens, len(ids), int | np.integer, "max_new_tokens")
    check_batch(checkpoint, ids, limits)
    limits = [min(n, checkpoint.config.max_position_embeddings - len(i)) for n, i in zip(limits, ids, strict=True)]
    _check_search(limits, beams, length_penalty, early_stopping, answers, options)
    if not ids:
        return []
    rules = Rules(
        _settings(checkpoint, ids, limits, beams, options), jnp.float32(length_penalty), jnp.asarray(early_stopping)
    )
    found = _run(checkpoint, ids, limits, beams, rules, options)
    tokens, lengths, scores = (np.asarray(part) for part in (found.tokens, found.lengths, found.scores))
    failed, reached = (np.asarray(part)[::beams].tolist() for part in (found.rows.failed, found.rows.lengths))
    return [
        [Beam("", [], -math.inf, "error", explain(failed[row], reached[row] - len(prompt)))]
        if failed[row]
        else [
            _beam(checkpoint, tokens[row, w, len(prompt) : lengths[row, w]].tolist(), float(scores[row, w]))
            for w in range(answers)
            if np.isfinite(scores[row, w])
        ]
        for row, prompt in enumerate(ids)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """The state of a search.

    Attributes:
      rows: the beams, as R rows; a prompt whose search is over has only rows that are done.
      sums: float32 [B, W]: the sum of the log-probabilities of each beam's new tokens; -inf for a beam that is not used
        (at the beginning, when all beams of a prompt are equal, only the first one is).
      tokens: int32 [B, W, M]: the best finished answers, best first, with their prompts.
      lengths: int32 [B, W]: of these, prompt included.
      scores: float32 [B, W]: of these; -inf where there is none yet.
    """

    rows: DecodeState
    sums: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What stays the same for a whole search.

    Attributes:
      settings: of the R rows.
      length_penalty: float32 scalar.
      early_stopping: bool scalar.
    """

    settings: Settings
    length_penalty: jax.Array
    early_stopping: jax.Array


@functools.partial(jax.jit, static_argnames="beams")
def start(prompts: DecodeState, last: jax.Array, beams: int) -> tuple[Search, jax.Array]:
    """From B prompts that have been read, and `last` [B, D], to beams, equal for each prompt, and `last` [R, D]."""
    B, M = prompts.tokens.shape
    origin = jnp.repeat(jnp.arange(B), beams)
    sums = jnp.where(jnp.arange(beams) == 0, jnp.zeros((B, beams), jnp.float32), -jnp.inf)
    finished = (
        jnp.zeros((B, beams, M), jnp.int32),
        jnp.zeros((B, beams), jnp.int32),
        jnp.full((B, beams), -jnp.inf, jnp.float32),
    )
    return Search(reorder(prompts, origin), sums, *finished), last[origin]


def reorder(state: DecodeState, rows: jax.Array) -> DecodeState:
    """The state whose row i is the given state's row `rows[i]`."""

    def of_layers(x: jax.Array | None) -> Any:
        return None if x is None else x[:, rows]

    old = state.cache
    cache = KVCache(
        of_layers(old.k), of_layers(old.v), old.positions[rows], of_layers(old.k_scale), of_layers(old.v_scale)
    )
    others = {
        field.name: getattr(state, field.name)[rows]
        for field in dataclasses.fields(state)
        if field.name not in ("cache", "logprobs")
    }
    return DecodeState(cache, **others)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="search")
def choose(config: Phi3Config, params: Params, search: Search, last: jax.Array, rules: Rules) -> Search:
    """Takes the next token of each beam, from `last` [R, D] of `decoding.read` or `decoding.step`."""
    rows, settings, (B, W) = search.rows, rules.settings, search.sums.shape
    first = slice(None, None, W)  # the first beam of each prompt, for values that all of its beams share
    done, lengths = rows.done[first], rows.lengths[first] + 1
    count = lengths - settings.prompt_lengths[first]
    at_limit = count >= settings.limits[first]

    logits: Any = Phi3(config).apply({"params": params}, last, method="unembed")
    # A beam that is not used yet is a copy of one that is.
    has_failed = ~done & ~is_finite(logits).reshape(B, W).all(axis=1)
    parents, tokens, sums = _candidates(logits, search.sums, len(settings.end_ids))
    ends = (tokens[..., None] == settings.end_ids).any(axis=-1) | at_limit[:, None]

    def grown(some: jax.Array) -> jax.Array:
        """The tokens [B, n, M] of candidates, given as indices [B, n] into the C."""
        history = rows.tokens[_rows(jnp.take_along_axis(parents, some, axis=1), W)]
        where = jnp.arange(history.shape[-1]) == lengths[:, None, None] - 1
        return jnp.where(where, jnp.take_along_axis(tokens, some, axis=1)[..., None], history)

    # Candidates after the first W are only there to have enough beams that do not end: they may not finish.
    may_finish = ends[:, :W] & ~(done | has_failed)[:, None]
    divisor = count[:, None].astype(jnp.float32) ** rules.length_penalty
    scores = jnp.where(may_finish, sums[:, :W] / divisor, -jnp.inf)
    search = _finish(search, grown(jnp.broadcast_to(jnp.arange(W), (B, W))), lengths, scores)

    sums, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), W)
    after = reorder(rows, _rows(jnp.take_along_axis(parents, going, axis=1), W).reshape(-1))
    # Divided by a greater length, a score may still rise: this is a heuristic, the same as in transformers.
    is_hopeless = sums[:, 0] / divisor[:, 0] <= search.scores[:, -1]
    is_full = search.scores[:, -1] > -jnp.inf
    after = dataclasses.replace(
        after,
        tokens=grown(going).reshape(rows.tokens.shape),
        lengths=jnp.where(after.done | jnp.repeat(has_failed, W), after.lengths, after.lengths + 1),
        failed=jnp.where(jnp.repeat(has_failed, W), NOT_FINITE, after.failed),
        done=jnp.repeat(done | has_failed | at_limit | (is_full & (is_hopeless | rules.early_stopping)), W),
    )
    return dataclasses.replace(search, rows=after, sums=sums)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="search")
def search_on(config: Phi3Config, params: Params, search: Search, rules: Rules) -> Search:
    """Takes steps until all searches are over, or the beams of one must be restarted."""

    def more(search: Search) -> jax.Array:
        return ~search.rows.done.all() & ~decoding.must_restart(config, search.rows, rules.settings)

    def turn(search: Search) -> Search:
        rows, last = decoding.step(config, params, search.rows)
        return choose(config, params, dataclasses.replace(search, rows=rows), last, rules)

    return jax.lax.while_loop(more, turn, search)


def _candidates(logits: jax.Array, sums: jax.Array, ends: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations -> (beams int32 [B, C], next tokens int32 [B, C], sums float32 [B, C]), best first.

    logits are [R, V]. C is such that W are left even if every beam ends with every end id.
    """
    B, W = sums.shape
    C = min(max(2, 1 + ends), logits.shape[-1]) * W
    # First the best of each beam, then the best of these: one sort over W x V took a third of a step on the CPU.
    each, tokens = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(C, logits.shape[-1]))
    sums = (sums[..., None] + each.reshape(B, W, -1)).reshape(B, -1)
    sums, places = jax.lax.top_k(sums, C)
    parents = places // each.shape[-1]
    return parents, jnp.take_along_axis(tokens.reshape(B, -1), places, axis=1), sums


def _finish(search: Search, tokens: jax.Array, lengths: jax.Array, scores: jax.Array) -> Search:
    """Adds answers, int32 [B, W, M] of lengths [B] and scores [B, W], to the finished ones, and keeps the best W."""
    B, W = scores.shape
    scores, kept = jax.lax.top_k(jnp.concatenate([search.scores, scores], axis=1), W)
    tokens = jnp.concatenate([search.tokens, tokens], axis=1)
    all_lengths = jnp.concatenate([search.lengths, jnp.broadcast_to(lengths[:, None], (B, W))], axis=1)
    return dataclasses.replace(
        search,
        tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
        lengths=jnp.take_along_axis(all_lengths, kept, axis=1),
        scores=scores,
    )


def _rows(beams: jax.Array, width: int) -> jax.Array:
    """Beams [B, n] of each prompt -> their rows among all R."""
    return jnp.arange(len(beams))[:, None] * width + beams


def _run(
    checkpoint: Checkpoint, prompts: list[list[int]], limits: list[int], beams: int, rules: Rules, options: Options
) -> Search:
    """The search from beginning to end."""
    config, params, chunk = checkpoint.config, checkpoint.params, options.prefill_chunk
    search, last = _begin(checkpoint, prompts, limits, beams, options)
    search = choose(config, params, search, last, rules)
    while not bool(search.rows.done.all()):
        if bool(decoding.must_restart(config, search.rows, rules.settings)):
            rows, last = _read(checkpoint, decoding.restart(search.rows, rules.settings), chunk)
            search = choose(config, params, dataclasses.replace(search, rows=rows), last, rules)
        else:
            search = search_on(config, params, search, rules)
    return search


def _begin(
    checkpoint: Checkpoint, prompts: list[list[int]], limits: list[int], beams: int, options: Options
) -> tuple[Search, jax.Array]:
    """Reads the prompts, once for all their beams -> (search, last [R, D])."""
    config = checkpoint.config
    # Not the large rooms of other runs: every step copies the cache.
    most = max(options.room, *(len(prompt) + n for prompt, n in zip(prompts, limits, strict=True)))
    room = min(room_rung(most), max(most, config.max_position_embeddings))
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    capacity = slots_needed(config, room, options.prefill_chunk)
    dtype = jnp.dtype(options.cache_dtype or own_cache_dtype(checkpoint))
    settings = _settings(checkpoint, prompts, limits, 1, options)
    state = decoding.begin(config, settings, jnp.asarray(tokens), capacity, dtype)
    return start(*_read(checkpoint, state, options.prefill_chunk), beams)


def _settings(
    checkpoint: Checkpoint, prompts: list[list[int]], limits: list[int], beams: int, options: Options
) -> Settings:
    """Settings for `beams` rows of each prompt."""
    return Settings(
        limits=jnp.repeat(jnp.asarray(limits, jnp.int32), beams),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        sampling=SamplingArrays.of([Sampling()] * (len(limits) * beams), checkpoint.config.vocab_size),
        prompt_lengths=jnp.repeat(jnp.asarray([len(prompt) for prompt in prompts], jnp.int32), beams),
        rope_policy=options.rope_policy,
    )


def _read(checkpoint: Checkpoint, state: DecodeState, chunk: int) -> tuple[DecodeState, jax.Array]:
    """Reads all tokens of every row -> (state, the model's output at each row's last token)."""
    prefill = Prefill.start(checkpoint.params, len(state.tokens), int(state.lengths.max()), chunk)
    read = functools.partial(decoding.read, checkpoint.config, checkpoint.params)
    return prefill.read_all(read, state), prefill.last


def _beam(checkpoint: Checkpoint, token_ids: list[int], score: float) -> Beam:
    answer = Answer(checkpoint)
    answer.add(NewTokens(token_ids, None), "length")
    done = answer.finish()
    return Beam(done.text, done.token_ids, score, "stop" if done.finish_reason == "stop" else "length")


def _check_search(
    limits: list[int], beams: int, length_penalty: float, early_stopping: bool, answers: int, options: Options
) -> None:
    if not 1 <= beams <= MOST_BEAMS:
        raise ValueError(f"beams={beams} must be at least 1 and at most {MOST_BEAMS}")
    if not 1 <= answers <= beams:
        raise ValueError(f"answers={answers} must be at least 1 and at most beams={beams}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} must be a finite number")
    longest = max(limits, default=1)
    if abs(length_penalty) * math.log(longest) > _LARGEST_EXPONENT:
        raise ValueError(f"length_penalty={length_penalty} is too large for max_new_tokens={longest}: scores overflow")
    if not isinstance(early_stopping, bool):
        raise ValueError(f"early_stopping={early_stopping!r} must be True or False")
    for field in dataclasses.fields(Options):
        if field.name not in _RESPECTED and getattr(options, field.name) != field.default:
            raise ValueError(f"beam search does not understand options.{field.name}: leave it out")
    if options.rope_policy == "batch":
        raise ValueError("beam search treats each prompt as if alone: rope_policy must be 'length' or 'capacity'")

"""Generation one token at a time, with values read at every step and changes in force at every step.

The functions of the engine's loop (engine/decoding.py), so that the tokens are those of `generate`: prompts are read in
the same chunks, tokens picked by the same sampler, and all is read again where LongRoPE's border is crossed. One
program reads, one picks the token after that, and one takes a step; other edits of the same shapes need no other.
Only where values of single heads or attention's weights are read, XLA computes attention in place of the kernels, and
rounds otherwise: where two tokens are as good as equally likely, another may be picked then.

Axis letters: L layer, B batch (one row), T query (one token), S slot of the cache, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.config import Phi3Config
from phi3_jax.inspection import Edit, Hooks
from phi3_jax.inspection.edits import Numbers
from phi3_jax.inspection.running import chosen
from phi3_jax.model import Params, slots_needed

from ..engine import Options, decoding
from ..engine.buckets import most_at_once, own_cache_dtype, room_rung
from ..engine.failures import explain
from ..engine.news import News
from ..engine.prefill import Prefill
from ..prompts import Prompt, check_batch, encode_prompt
from ..sampling import Sampling, SamplingArrays

_RESPECTED = ("prefill_chunk", "cache_dtype", "rope_policy")
Seen = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
    """One new token, and what led to it.

    Attributes:
      token: its id.
      place: its position in the text: so many tokens are before it.
      seen: what was read at the token before it, by the points' names: POINTS has the axes, with an L in front for
        those of layers; B and T are 1. Keys S are slots of the cache, see `by_position`. "logits" are always there.
    """

    token: int
    place: int
    seen: Seen

    @property
    def logits(self) -> jax.Array:
        """float32 [V]: of the model, with edits, but before all that `Sampling` asks for."""
        return self.seen["logits"][0, 0]

    def by_position(self, values: Any, missing: float = 0.0) -> np.ndarray:
        """Values of slots [..., S] -> of the positions of the text [..., place].

        Where a window's ring buffer has overwritten a token, its value is `missing`.
        """
        values = np.asarray(values)
        places = np.arange(max(0, self.place - values.shape[-1]), self.place)  # those that are still there
        found = np.full((*values.shape[:-1], self.place), missing, values.dtype)
        found[..., places] = values[..., places % values.shape[-1]]
        return found


def steps(
    checkpoint: Checkpoint,
    prompt: Prompt,
    new: int,
    reads: Sequence[str] = (),
    edits: Sequence[Edit] = (),
    sampling: Sampling | None = None,
    *,
    layers: Numbers = None,
    heads: Numbers = None,
    options: Options | None = None,
) -> Iterator[Step]:
    """Continues a prompt, step by step.

    Args:
      prompt: text or token ids.
      new: the most new tokens; there are fewer where one of them ends the answer, or the context is full.
      reads: points, as for `phi3_jax.inspection.run`.
      edits: changes (phi3_jax.inspection) that are made while the prompt is read and at every step. Their positions are
        those of prompt and answer together; without positions they are made at all tokens (see `Options.edits`).
      sampling: how tokens are picked; greedily if None.
      layers, heads: those that are read; None reads all.
      options: prefill_chunk, cache_dtype and rope_policy; nothing else may be set.

    Raises:
      ValueError: at once, for arguments that make no sense; later, where the logits are no finite numbers, or no token
        may be picked.
    """
    ids, options = encode_prompt(checkpoint, prompt), options or Options()
    check_batch(checkpoint, [ids], [new])
    for field in dataclasses.fields(Options):
        if field.name not in _RESPECTED and getattr(options, field.name) != field.default:
            beside = "pass edits beside them" if field.name == "edits" else "leave it out"
            raise ValueError(f"steps do not understand options.{field.name}: {beside}")
    options, config = dataclasses.replace(options, edits=tuple(edits)), checkpoint.config  # which checks them
    reads = (*([reads] if isinstance(reads, str) else reads), "logits")
    hooks = chosen(config, jnp.asarray([ids]), reads, layers, None, heads, options.edits)
    settings = decoding.Settings(
        limits=jnp.asarray([min(new, config.max_position_embeddings - len(ids))], jnp.int32),
        end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
        sampling=SamplingArrays.of([sampling or Sampling()], config.vocab_size),
        prompt_lengths=jnp.asarray([len(ids)], jnp.int32),
        rope_policy=options.rope_policy,
    )
    return _steps(checkpoint, ids, settings, options, hooks)


def _steps(
    checkpoint: Checkpoint, ids: list[int], settings: decoding.Settings, options: Options, hooks: Hooks
) -> Iterator[Step]:
    config, params, place = checkpoint.config, checkpoint.params, len(ids)
    state = _start(checkpoint, ids, settings, options)
    must_read, is_over = True, False
    while not is_over:
        if must_read:
            state, last, seen = _read_all(checkpoint, state, place, options, hooks)
            state, logits = _answer(config, params, state, last, settings, hooks)
            seen = {**seen, **logits}
        else:
            state, seen = _turn(config, params, state, settings, hooks)
        news = News.read(state.news, 1)
        if news.failed[0]:
            raise ValueError(explain(int(news.failed[0]), place - len(ids)))
        yield Step(int(news.tokens[0, 0]), place, seen)
        place, is_over, must_read = place + 1, bool(news.done[0]), news.restart
        if must_read:
            state = decoding.restart(state, settings)


def _start(
    checkpoint: Checkpoint, ids: list[int], settings: decoding.Settings, options: Options
) -> decoding.DecodeState:
    """The state before the prompt is read. The cache is no larger than needed: some reads look at all of its slots."""
    config = checkpoint.config
    tokens = len(ids) + int(settings.limits[0])
    room = min(room_rung(tokens), max(tokens, config.max_position_embeddings))
    dtype = jnp.dtype(options.cache_dtype or own_cache_dtype(checkpoint))
    row = jnp.zeros((1, room), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    return decoding.begin(config, settings, row, slots_needed(config, room, most_at_once(options)), dtype)


def _read_all(
    checkpoint: Checkpoint, state: decoding.DecodeState, length: int, options: Options, hooks: Hooks
) -> tuple[decoding.DecodeState, jax.Array, Seen]:
    """Reads all tokens -> (state, the model's output at the last of them [B, D], what was read at that one)."""
    seen: Seen = {}

    def read(state: Any, last: Any, begin: Any, size: int, _: bool) -> tuple[decoding.DecodeState, jax.Array]:
        nonlocal seen
        # Of the other chunks, any place will do.
        at = jnp.clip(length - 1 - begin, 0, size - 1).reshape(1, 1)
        here = dataclasses.replace(hooks, positions=at)
        state, last, seen = _read(checkpoint.config, checkpoint.params, state, last, begin, size, here)
        return state, last

    prefill = Prefill.start(checkpoint.params, 1, length, options.prefill_chunk)
    state = prefill.read_all(read, state)
    return state, prefill.last, seen


@functools.partial(jax.jit, static_argnames=("config", "size"), donate_argnames=("state", "last"))
def _read(
    config: Phi3Config,
    params: Params,
    state: decoding.DecodeState,
    last: jax.Array,
    begin: jax.Array,
    size: int,
    hooks: Hooks,
) -> tuple[decoding.DecodeState, jax.Array, Seen]:
    return decoding.read_chunk(config, params, state, last, begin, size, False, hooks)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _answer(
    config: Phi3Config,
    params: Params,
    state: decoding.DecodeState,
    last: jax.Array,
    settings: decoding.Settings,
    hooks: Hooks,
) -> tuple[decoding.DecodeState, Seen]:
    return _accept(config, params, state, last[:, None], settings, hooks)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _turn(
    config: Phi3Config, params: Params, state: decoding.DecodeState, settings: decoding.Settings, hooks: Hooks
) -> tuple[decoding.DecodeState, Seen]:
    state, x, seen = decoding.forward(config, params, state, decoding.no_guesses(state), hooks)
    state, logits = _accept(config, params, state, x, settings, hooks)
    return state, {**seen, **logits}


def _accept(
    config: Phi3Config,
    params: Params,
    state: decoding.DecodeState,
    x: jax.Array,
    settings: decoding.Settings,
    hooks: Hooks,
) -> tuple[decoding.DecodeState, Seen]:
    before, none = state.lengths, decoding.no_guesses(state)
    state, logits = decoding.accept(config, params, state, x, none, settings, hooks=hooks)
    return decoding.tell(config, before, state, settings), logits

"""Runs a batch from prompts to answers, in token ids: the host's side of decoding.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.model import slots_needed

from ..prompts import check_batch
from ..sampling import Grammar, Sampling, SamplingArrays, TokenLogprob
from ..sampling.grammar import GrammarMasks
from . import decoding
from .buckets import most_at_once, own_cache_dtype, sizes_for
from .failures import NO_TOKEN, explain
from .news import News
from .options import Options
from .prefill import Prefill
from .prompt_cache import PromptCache, fingerprint
from .speculation import DraftModel, LookupDrafter, ModelDrafter, PromptLookup
from .timings import Timings


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What a row got in one call of `Run.advance`.

    Attributes:
      logprobs: an entry for each token; None if not wanted.
      error: why the row could not go on after these tokens, and has ended; else None.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    error: str | None = None


class Run:
    """A batch of prompts that are being answered.

        run = Run(checkpoint, prompts, [32] * len(prompts))
        while not run.is_over:
            new = run.advance()

    Attributes:
      options: as given.
      timings: where the time went so far.
      reused: how many tokens of each prompt were taken from the prompt cache instead of being read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        sampling: Sequence[Sampling] | None = None,
        options: Options | None = None,
        grammars: Sequence[Grammar | None] | None = None,
        watched: np.ndarray | None = None,
    ):
        """Checks the arguments and sets the sizes of arrays; nothing is run yet.

        Args:
          max_new_tokens: the most new tokens of each row; the model's context is a limit, too.
          sampling: how each row picks its tokens; greedily if None.
          grammars: what each row's answer must match.
          watched: uint8 [V], of `sampling.watched_tokens`: `advance` returns when a row may have come to a stop string,
            without using up its steps.

        Raises:
          ValueError: a prompt is empty, has ids outside of the vocabulary, or fills the model's context; a number makes
            no sense; options contradict one another.
        """
        self.options = options = options or Options()
        check_batch(checkpoint, prompts, max_new_tokens)
        _check_options(checkpoint, options)
        self._checkpoint, config = checkpoint, checkpoint.config
        self._prompts = [list(prompt) for prompt in prompts]
        limits = [
            min(n, config.max_position_embeddings - len(prompt))
            for n, prompt in zip(max_new_tokens, prompts, strict=True)
        ]
        self._lengths = [len(prompt) for prompt in prompts]
        tokens = max((length + n for length, n in zip(self._lengths, limits, strict=True)), default=1)
        self._rows, self._room = sizes_for(checkpoint, len(prompts), tokens, options, self._cache_dtype())
        unused = [0] * (self._rows - len(prompts))  # rows without a prompt, done from the start
        self._settings = decoding.Settings(
            limits=jnp.asarray([*limits, *unused], jnp.int32),
            end_ids=jnp.asarray(checkpoint.generation.eos_token_ids, jnp.int32),
            sampling=SamplingArrays.of(
                [*(sampling or [Sampling()] * len(prompts)), *(Sampling() for _ in unused)], config.vocab_size
            ),
            prompt_lengths=jnp.asarray([*self._lengths, *unused], jnp.int32),
            rope_policy=options.rope_policy,
            watched=jnp.asarray(np.zeros(config.vocab_size, np.uint8) if watched is None else watched),
            edits=options.edits,
        )
        # Where there are none, calls are those of beam search, whose programs they share then.
        self._edits: dict[str, Any] = {"edits": options.edits} if options.edits else {}
        # Not worth a program of its own for greedy rows, as the loop has on accelerators.
        self._answering = dataclasses.replace(self._settings, sampling=self._settings.sampling.for_any())
        self._masks = _grammar_masks(checkpoint, grammars, options)
        self._fingerprint: str | None = None
        self._state: decoding.DecodeState | None = None  # made by the first call of `advance`
        self._prefill: Prefill | None = None
        self._phase = "prefill"  # the timing that reading counts to: "decode" if rows are read again
        self._drafter: Any = None
        self._done = np.zeros(len(prompts), bool)
        self._must_restart = False
        self._numbers: dict[int, jax.Array] = {}  # on the device, so that they are sent there once
        self._errors: list[str | None] = [None] * len(prompts)
        self.timings = Timings()
        self.reused = 0
        self._place_prompt_cache()

    @property
    def is_over(self) -> bool:
        """Whether all rows have ended."""
        return bool(self._done.all())

    @property
    def done(self) -> list[bool]:
        """Which rows have ended."""
        return self._done.tolist()

    @property
    def guesses(self) -> tuple[int, int]:
        """With speculation: how many tokens were guessed so far, and how many of them were right."""
        return (0, 0) if self._state is None else (int(self._state.offered.sum()), int(self._state.taken.sum()))

    def advance(self, steps: int = 1) -> list[NewTokens]:
        """Calls a compiled function once -> the new tokens of each row.

        The first calls each read a chunk of the prompts, and the last of these gives each row its first token. After
        that, each call takes up to `steps` turns of the loop. A row that cannot go on ends with an `error`; the others
        do not notice.
        """
        state = self._first_state() if self._state is None else self._state
        if self._state is None:
            self._prefill = self._start_prefill(self._checkpoint, self.reused, self.options.echo)
        elif self._prefill is None and self._must_restart:
            state = decoding.restart(state, self._settings)
            self._prefill, self._phase = self._start_prefill(self._checkpoint), "decode"
        if self._prefill is not None:
            self._state = self._read_on(state, self._prefill)
        elif self._masks is not None:
            self._state = self._step_by_grammar(state)
        else:
            asked = self.options.speculation
            draft_params = asked.checkpoint.params if isinstance(asked, DraftModel) else None
            if steps not in self._numbers:
                self._numbers[steps] = jnp.int32(steps)
            args = state, self._settings, self._numbers[steps], self._drafter, draft_params
            self._state, self._drafter = self._timed("decode", decoding.decode, *args)
        return self._new_tokens(self._state)

    @property
    def reading(self) -> tuple[int, int]:
        """How many tokens of the longest row have been read, and how many there are; equal if nothing is being read."""
        longest = max(self._lengths, default=0)
        return (longest if self._prefill is None else min(self._prefill.place, longest)), longest

    def end(self, rows: Sequence[int]) -> None:
        """Ends rows from outside, between two calls of `advance`."""
        if all(self._done[row] for row in rows):
            return
        self._done[list(rows)] = True
        if self._state is not None:
            self._state = dataclasses.replace(self._state, done=self._padded_done())

    def prompt_logprobs(self, row: int) -> list[TokenLogprob]:
        """A prompt's log-probabilities, once `advance` has read it. Raises ValueError without `Options.echo`.

        They end at the first one that is no number; the row has ended with an error then.
        """
        if self._state is None or self._state.logprobs is None or not self.options.echo:
            raise ValueError("prompts have log-probabilities after `advance`, with Options(logprobs=..., echo=True)")
        return self._state.logprobs.read(row, self._prompts[row], 0)

    def prompt_cache(self, row: int = 0) -> PromptCache:
        """A row's keys and values so far, for `Options.prompt_cache` of another run.

        Raises:
          ValueError: there is no such row, nothing was read, or some of them are not finite numbers.
        """
        if self._state is None:
            raise ValueError("nothing has been read yet: call `advance` first")
        if not 0 <= row < len(self._prompts):
            raise ValueError(f"row {row} is not one of the run's {len(self._prompts)} rows")
        tokens = np.asarray(self._state.tokens[row])[: self._lengths[row]].tolist()
        is_long = self._is_long(int(self._state.rope_lengths[row]))
        return PromptCache.take(self._state.cache, row, tokens, is_long, self._model_fingerprint())

    def _first_state(self) -> decoding.DecodeState:
        tokens, capacity = np.zeros((self._rows, self._room), np.int32), self._capacity(self._checkpoint.config)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = prompt
        dtype, logprobs = self._cache_dtype(), self.options.logprobs
        state = decoding.begin(
            self._checkpoint.config, self._settings, jnp.asarray(tokens), capacity, dtype, logprobs, unset=True
        )
        if self.options.prompt_cache is not None and self.reused:
            state = dataclasses.replace(state, cache=self.options.prompt_cache.place(state.cache, self.reused))
        return dataclasses.replace(state, done=state.done | self._padded_done()) if self._done.any() else state

    def _padded_done(self) -> jax.Array:
        """`done` for the device: rows without a prompt are done."""
        return jnp.asarray(np.pad(self._done, (0, self._rows - len(self._done)), constant_values=True))

    def _place_prompt_cache(self) -> None:
        """Finds out how many tokens of the prompts need not be read."""
        cache = self.options.prompt_cache
        if cache is None or not self._prompts:
            return
        if cache.fingerprint != self._model_fingerprint():
            raise ValueError(
                "the prompt cache was made with another model, or with other edits: make it again with this one"
            )
        lengths = np.asarray(self._settings.rope_lengths(self._settings.prompt_lengths))[: len(self._prompts)].tolist()
        self.reused = min(
            cache.usable(self._checkpoint.config, prompt, self._is_long(length))
            for prompt, length in zip(self._prompts, lengths, strict=True)
        )

    def _start_prefill(self, model: Checkpoint, place: int = 0, echo: bool = False) -> Prefill:
        return Prefill.start(model.params, self._rows, max(self._lengths), self.options.prefill_chunk, place, echo)

    def _read_on(self, state: decoding.DecodeState, prefill: Prefill) -> decoding.DecodeState:
        """Reads the next chunk of every row; after the last one takes the next token of each."""
        state = prefill.read_chunk(functools.partial(self._timed, self._phase, decoding.read, **self._edits), state)
        if not prefill.is_over:
            return state
        self._prefill = None
        state = self._timed(self._phase, decoding.answer, state, prefill.last, self._answering, self._allowed())
        if self._phase == "prefill":
            self._drafter = self._start_drafter(state.tokens)
        return state

    def _start_drafter(self, tokens: jax.Array) -> Any:
        """Makes the drafter, if one is asked for, when the prompts have been read."""
        asked = self.options.speculation
        if isinstance(asked, PromptLookup):
            return LookupDrafter(asked)
        if not isinstance(asked, DraftModel):
            return None
        model, settings = asked.checkpoint, dataclasses.replace(self._settings, rope_policy="capacity")
        capacity, dtype = self._capacity(model.config), own_cache_dtype(model)
        state = decoding.begin(model.config, settings, tokens + 0, capacity, dtype, unset=True)
        read = functools.partial(self._timed, "prefill", decoding.read, model=model)
        state = self._start_prefill(model).read_all(read, state)
        return ModelDrafter(model.config, asked.guesses, state.cache, state.rope_lengths)

    def _step_by_grammar(self, state: decoding.DecodeState) -> decoding.DecodeState:
        """One token of each row; the host finds out which ones are allowed while the device runs the model."""
        state, last = self._timed("decode", decoding.step, state, wait=False, **self._edits)
        return self._timed("decode", decoding.answer, state, last, self._answering, self._allowed())

    def _allowed(self) -> jax.Array | None:
        """The grammars' masks; a row whose grammar is at a dead end gets one that allows nothing, which ends it."""
        if self._masks is None:
            return None
        allowed = np.full((self._rows, self._masks.words), 0xFFFFFFFF, np.uint32)
        for row in np.flatnonzero(~self._done).tolist():
            try:
                allowed[row] = self._masks.mask(row)
            except ValueError as error:
                allowed[row], self._errors[row] = 0, str(error)
        return jnp.asarray(allowed)

    def _new_tokens(self, state: decoding.DecodeState) -> list[NewTokens]:
        news, new = News.read(state.news, len(self._prompts)), []
        whole = np.asarray(state.tokens) if max(news.counts, default=0) > news.tokens.shape[1] else None
        failed = np.where(self._done, 0, news.failed).tolist()  # those that are new
        for row, (begin, count) in enumerate(zip(self._lengths, news.counts, strict=True)):
            end = begin + count
            ids = (news.tokens[row, :count] if whole is None else whole[row, begin:end]).tolist()
            if self._masks is not None:
                for token in ids:
                    self._masks.push(row, token)
            error = None
            if failed[row]:
                # What the grammar says of itself is more than that it allowed no token.
                own = self._errors[row] if failed[row] == NO_TOKEN else None
                error = self._errors[row] = own or explain(failed[row], end - len(self._prompts[row]))
            logprobs = None if state.logprobs is None else state.logprobs.read(row, ids, begin)
            new.append(NewTokens(ids, logprobs, error))
            self._lengths[row] = end
        self._done, self._must_restart = self._done | news.done, news.restart
        return new

    def _timed(
        self, phase: str, function: Any, *args: Any, model: Checkpoint | None = None, wait: bool = True, **options: Any
    ) -> Any:
        """Calls a jitted function of a model's config, weights and the rest; times compilation and run separately."""
        model = model or self._checkpoint
        with self.timings.of(phase):
            result = function(model.config, model.params, *args, **options)
            return jax.block_until_ready(result) if wait else result

    def _capacity(self, config: Any) -> int:
        """Slots of a row's cache, with room for the most tokens that this run writes to it at once."""
        return slots_needed(config, self._room, most_at_once(self.options))

    def _cache_dtype(self) -> Any:
        if self.options.cache_dtype is not None:
            return jnp.dtype(self.options.cache_dtype)
        if self.options.prompt_cache is not None:
            return self.options.prompt_cache.cache.k.dtype
        return own_cache_dtype(self._checkpoint)

    def _is_long(self, rope_length: int) -> bool:
        rope = self._checkpoint.config.long_rope
        return rope is not None and rope_length > rope.original_max_position_embeddings

    def _model_fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._checkpoint, self.options.edits)
        return self._fingerprint


def _grammar_masks(
    checkpoint: Checkpoint, grammars: Sequence[Grammar | None] | None, options: Options
) -> GrammarMasks | None:
    if grammars is None or not any(grammars):
        return None
    if checkpoint.tokenizer is None:
        raise ValueError("a grammar needs a tokenizer: put tokenizer.json or tokenizer.model into the folder")
    if options.speculation is not None:
        raise ValueError("a grammar and speculation cannot be combined: leave one of them out")
    ends = checkpoint.generation.eos_token_ids
    return GrammarMasks(checkpoint.tokenizer, grammars, ends, checkpoint.config.vocab_size)


def _check_options(checkpoint: Checkpoint, options: Options) -> None:
    config, draft = checkpoint.config, options.speculation
    if options.logprobs is not None and options.logprobs > config.vocab_size:
        raise ValueError(f"logprobs={options.logprobs} is more than the vocabulary of {config.vocab_size}")
    if isinstance(draft, DraftModel) and draft.checkpoint.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {draft.checkpoint.config.vocab_size} tokens, the model one of "
            f"{config.vocab_size}: take a draft model of the same family"
        )

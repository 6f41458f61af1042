"""/v1/completions: texts, or token ids, that the model goes on with.

With `echo` and `logprobs` it is what lm-evaluation-harness asks servers for; `best_of` writes more answers than it
returns, and picks those whose tokens are the most likely on average.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phi3_jax.json_files import is_whole

from ...answer import Generation, Piece
from ...sampling import TokenLogprob
from ..engine import Job
from .chat import MOST_LOGPROBS, finite, read_stream, usage_of
from .errors import invalid
from .fields import (
    IGNORED,
    Fields,
    as_whole,
    read_fields,
    read_grammar,
    read_most_tokens,
    read_sampling,
    read_stop,
    with_seed,
)
from .gate.logs import note
from .service import Answers, Service
from .streams import DONE, EventStream, event, listing

_DEFAULT_TOKENS = 16  # OpenAI's
_FINISH = {"stop": "stop", "length": "length", "deadline": "length"}


async def completions(request: Request) -> Response:
    """The endpoint."""
    service: Service = request.app.state.service
    service.check_ready()
    fields = await read_fields(request)
    model = fields.text("model", service.model)
    adapter = service.adapter_of(model)
    prompts = _read_prompts(fields, service.limits.choices, service.context)
    grammar = read_grammar(fields)
    sampling, stop = read_sampling(fields, service.sampling), read_stop(fields)
    count = fields.whole("n", 1, 1, service.limits.choices)
    best_of = fields.whole("best_of", count, 1, service.limits.choices)
    most_tokens = read_most_tokens(fields, service.limits.answer_tokens, _DEFAULT_TOKENS, least=0)
    logprobs, echo = fields.whole("logprobs", None, 0, MOST_LOGPROBS), fields.truth("echo", False)
    stream, with_usage = read_stream(fields)
    fields.only("suffix", "")
    fields.refuse_others(IGNORED)
    if best_of < count:
        raise invalid(f"best_of={best_of} must be at least n={count}", "best_of")
    if stream and best_of > count:
        raise invalid("best_of does not go with stream=true: the best answer is known at the end", "best_of")
    if len(prompts) * best_of > service.limits.choices:
        asked = f"{len(prompts)} prompts with {best_of} answers each"
        raise invalid(f"{asked} are more answers than {service.limits.choices}", "prompt")

    jobs, texts = [], []
    for prompt in prompts:
        ids = await service.encode(prompt, add_eos=False) if isinstance(prompt, str) else prompt
        room = service.room_for(ids)
        if not echo:
            texts.append("")
        else:
            texts.append(prompt if isinstance(prompt, str) else await service.in_thread(_decode, service, ids))
        job = Job(
            ids,
            max(1, min(most_tokens, room)),
            sampling,
            stop,
            grammar,
            logprobs if best_of == count else logprobs or 0,
            echo=echo and logprobs is not None,
            adapter=adapter,
        )
        jobs += [dataclasses.replace(job, sampling=with_seed(sampling, index)) for index in range(best_of)]
    note(request.scope, model=model, prompt_tokens=sum(len(job.prompt) for job in jobs[::best_of]), stream=stream)
    if service.log_prompts:
        note(request.scope, prompts=prompts)
    asked_for = _Asked(service, jobs, texts, count, best_of, logprobs, echo, most_tokens == 0)
    answers = await service.open(*jobs)
    reply = _Reply(request, model, asked_for, answers)
    if stream:
        return EventStream(reply.chunks(with_usage), answers.close, service.limits.keep_alive)
    return await reply.whole()


def _decode(service: Service, ids: Sequence[int]) -> str:
    return service.tokenizer.decode(ids, skip_special_tokens=True)


def _read_prompts(fields: Fields, most: int, context: int) -> list[Any]:
    """Texts, or lists of token ids, from any of the four forms of `prompt`."""
    prompt = fields.required("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise fields.wrong("prompt", "a text, a list of token ids, or a list of these")
    if (longest := max(len(each) for each in (prompt, *prompt) if isinstance(each, list))) > max(most, context):
        code = "context_length_exceeded"  # before millions of ids are looked at
        raise invalid(f"prompt has a list of {longest} entries; {context} tokens have room", "prompt", code)
    prompt = [list(map(as_whole, each)) if isinstance(each, list) else as_whole(each) for each in prompt]
    if _are_ids(prompt):
        return [prompt]
    if len(prompt) > most:
        raise invalid(f"prompt has {len(prompt)} entries, more than {most}", "prompt")
    if not all(isinstance(each, str) for each in prompt) and not all(_are_ids(each) for each in prompt):
        raise fields.wrong("prompt", "a text, a list of token ids, or a list of these")
    return prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_whole, value))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a request wants: `best_of` jobs for each prompt, of which `count` come back.

    Attributes:
      texts: of the prompts, with `echo`; else empty.
      nothing: max_tokens is 0: only the prompts come back.
    """

    service: Service
    jobs: Sequence[Job]
    texts: Sequence[str]
    count: int
    best_of: int
    logprobs: int | None
    echo: bool
    nothing: bool


class _Reply:
    """The answers to one request, as OpenAI writes them."""

    def __init__(self, request: Request, model: str, asked: _Asked, answers: Answers):
        self._request, self._asked, self._answers = request, asked, answers
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokens = 0

    async def whole(self) -> Response:
        """All of it; the answers are closed then."""
        asked = self._asked
        try:
            generations = await self._answers.whole()
        finally:
            self._answers.close()
        self._tokens = 0 if asked.nothing else sum(len(each.token_ids) for each in generations)
        chosen = []
        for number, text in enumerate(asked.texts):
            some = generations[number * asked.best_of : (number + 1) * asked.best_of]
            if asked.best_of > asked.count:
                some = sorted(some, key=_likelihood, reverse=True)[: asked.count]
            chosen += [(text, generation) for generation in some]
        choices = ({"index": index, **self._choice(*each)} for index, each in enumerate(chosen))
        return await listing({**self._head, "usage": self._usage()}, "choices", choices)

    def _choice(self, prompt: str, generation: Generation) -> dict[str, Any]:
        entries = [] if self._asked.nothing else generation.logprobs or []
        if self._asked.echo:
            entries = [*(generation.prompt_logprobs or []), *entries]
        return {
            "text": prompt + ("" if self._asked.nothing else generation.text),
            "logprobs": self._logprobs(entries, 0)[0] if self._asked.logprobs is not None else None,
            "finish_reason": "length" if self._asked.nothing else _FINISH[generation.finish_reason],
        }

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
        """As OpenAI had them first, and where the text behind them begins."""
        tokens, offsets = [], []
        for entry in entries:
            tokens.append(self._string(entry.token_id))
            offsets.append(offset)
            offset += len(tokens[-1])
        tops = [None if entry.logprob is None else self._top(entry) for entry in entries]
        values = [finite(entry.logprob) for entry in entries]
        found = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        return found, offset

    def _top(self, entry: TokenLogprob) -> dict[str, float | None]:
        return {self._string(token): finite(value) for token, value in list(entry.top.items())[: self._asked.logprobs]}

    def _string(self, token: int) -> str:
        return self._asked.service.token_bytes(token).decode("utf-8", "replace")

    async def chunks(self, with_usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream."""
        asked, begun = self._asked, set[int]()
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        offsets = [0] * len(asked.jobs)
        async for piece in self._answers:
            text, entries = self._new_of(piece, begun)
            logprobs = None
            if asked.logprobs is not None:
                logprobs, offsets[piece.row] = self._logprobs(entries, offsets[piece.row])
            reason = None if piece.finish_reason is None else _FINISH[piece.finish_reason]
            choice = {
                "index": piece.row,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": "length" if asked.nothing and reason else reason,
            }
            if text or entries or reason:
                yield event({**self._head, "choices": [choice], **more})
        usage = self._usage()
        if with_usage:
            yield event({**self._head, "choices": [], "usage": usage})
        yield DONE

    def _new_of(self, piece: Piece, begun: set[int]) -> tuple[str, list[TokenLogprob]]:
        """What a piece adds, the prompt in front of the first one with `echo`."""
        asked = self._asked
        text, entries = ("", []) if asked.nothing else (piece.text, piece.logprobs or [])
        self._tokens += 0 if asked.nothing else len(piece.token_ids)
        if asked.echo and piece.row not in begun:
            begun.add(piece.row)
            text = asked.texts[piece.row // asked.best_of] + text
            entries = [*(self._answers.tickets[piece.row].prompt_logprobs or []), *entries]
        return text, entries

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(job.prompt) for job in self._asked.jobs[:: self._asked.best_of])
        return usage_of(self._request, prompts, self._tokens, self._answers.tickets[:: self._asked.best_of])


def _likelihood(generation: Generation) -> float:
    """The mean log-probability of an answer's tokens."""
    values = [entry.logprob or 0.0 for entry in generation.logprobs or []]
    return sum(values) / max(len(values), 1)


routes = [Route("/v1/completions", completions, methods=["POST"])]

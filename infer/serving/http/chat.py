"""/v1/chat/completions: a conversation -> the assistant's next message.

fields -> messages, tools, grammar -> encode_chat -> jobs -> pieces -> Choice -> message, or deltas
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phi3_jax.text import ToolCall, ToolCallParser

from ...answer import Piece
from ...sampling import TokenLogprob
from ..engine import Job, Ticket
from .errors import invalid
from .fields import (
    IGNORED,
    Fields,
    ToolUse,
    read_fields,
    read_grammar,
    read_messages,
    read_most_tokens,
    read_sampling,
    read_stop,
    read_template_options,
    read_tool_use,
    with_seed,
)
from .gate.logs import note
from .service import Answers, Service
from .streams import DONE, EventStream, event, listing

MOST_LOGPROBS = 20
_FINISH = {"stop": "stop", "length": "length", "deadline": "length"}


async def chat(request: Request) -> Response:
    """The endpoint."""
    service: Service = request.app.state.service
    service.check_ready()
    fields = await read_fields(request)
    model = fields.text("model", service.model)
    adapter = service.adapter_of(model)
    messages = read_messages(fields, service.limits.messages)
    use = read_tool_use(fields, service.limits.tools)
    grammar, options = read_grammar(fields), read_template_options(fields)
    if grammar is not None and use.shown:
        raise invalid('response_format goes with tools only if tool_choice is "none"', "response_format")
    sampling, stop = read_sampling(fields, service.sampling), read_stop(fields)
    count = fields.whole("n", 1, 1, service.limits.choices)
    most_tokens = read_most_tokens(fields, service.limits.answer_tokens, None)
    logprobs = _read_logprobs(fields)
    stream, with_usage = read_stream(fields)
    for name, value in (("modalities", ["text"]), ("audio", None), ("prediction", None), ("reasoning_effort", "none")):
        fields.only(name, value)
    fields.refuse_others(IGNORED)

    prompt = await service.encode_chat(messages, use.shown, template_options=options)
    room = service.room_for(prompt, "messages")
    note(request.scope, model=model, prompt_tokens=len(prompt), stream=stream)
    if service.log_prompts:
        note(request.scope, messages=messages)
    job = Job(
        prompt,
        min(most_tokens or room, room),
        sampling,
        stop,
        use.grammar or grammar,
        logprobs,
        adapter=adapter,
        markers=use.shown is not None,
    )
    jobs = [dataclasses.replace(job, sampling=with_seed(sampling, index)) for index in range(count)]
    answers = await service.open(*jobs)
    reply = _Reply(request, service, model, len(prompt), [Choice(service, use, logprobs) for _ in jobs], answers)
    if stream:
        return EventStream(reply.chunks(with_usage), answers.close, service.limits.keep_alive)
    return await reply.whole()


class _Reply:
    """The answers to one request, as OpenAI writes them."""

    def __init__(
        self,
        request: Request,
        service: Service,
        model: str,
        prompt_tokens: int,
        choices: Sequence[Choice],
        answers: Answers,
    ):
        self._request, self._model, self._prompt_tokens = request, model, prompt_tokens
        self._choices, self._answers = choices, answers
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def whole(self) -> Response:
        """All of it; the answers are closed then."""
        try:
            async for piece in self._answers:
                self._choices[piece.row].add(piece)
                self._choices[piece.row].entries += piece.logprobs or []
        finally:
            self._answers.close()
        choices = ({"index": index, **choice.whole()} for index, choice in enumerate(self._choices))
        return await listing({**self._head, "object": "chat.completion", "usage": self._usage()}, "choices", choices)

    async def chunks(self, with_usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream, one for each piece."""
        more: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})

        for index in range(len(self._choices)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for piece in self._answers:
            choice = self._choices[piece.row]
            deltas, logprobs = choice.add(piece), choice.logprobs_of(piece)
            if logprobs is not None and not deltas:
                deltas = [{}]  # of a character that is not complete
            found = [chunk(piece.row, delta, logprobs if not i else None) for i, delta in enumerate(deltas)]
            if choice.finish_reason is not None:
                found.append(chunk(piece.row, {}, None, choice.finish_reason))
            if found:
                yield b"".join(found)
        usage = self._usage()
        if with_usage:
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        tokens = sum(choice.tokens for choice in self._choices)
        note(self._request.scope, finish=[choice.finish_reason for choice in self._choices])
        return usage_of(self._request, self._prompt_tokens, tokens, self._answers.tickets[:1])


def usage_of(request: Request, prompt_tokens: int, tokens: int, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """How many tokens a request took; they go into its line of the log, too. Tickets: one for each prompt."""
    cached = sum(ticket.reused for ticket in tickets)
    note(request.scope, completion_tokens=tokens, cached_tokens=cached)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Choice:
    """One message while it is written.

    Attributes:
      content: what it says beside the calls, so far.
      calls: in their order, with their ids.
      tokens: how many it has.
      finish_reason: None while it goes on.
      entries: the log-probabilities of an answer that comes as a whole; as objects, which are small.
    """

    def __init__(self, service: Service, use: ToolUse, logprobs: int | None = None):
        self._service, self._use, self._logprobs = service, use, logprobs
        self._parser = None if use.shown is None else ToolCallParser(use.shown)
        self.entries: list[TokenLogprob] = []
        self.content, self.tokens = "", 0
        self.calls: list[tuple[str, ToolCall]] = []
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Adds a piece -> what is certain now, as deltas of a message."""
        text, deltas = piece.text, []
        self.tokens += len(piece.token_ids)
        if self._parser is not None:
            text = self._parser.push(text) + (self._parser.flush() if piece.finish_reason else "")
        if text:
            self.content += text
            deltas.append({"content": text})
        for call in [] if self._parser is None else self._parser.calls[len(self.calls) : self._use.most]:
            deltas += self._new_call(call)
        if piece.finish_reason is not None:
            reason = _FINISH[piece.finish_reason]
            self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return deltas

    def _new_call(self, call: ToolCall) -> list[dict[str, Any]]:
        index, name = len(self.calls), call_id()
        self.calls.append((name, call))
        head = {"index": index, "id": name, "type": "function", "function": {"name": call.name, "arguments": ""}}
        rest = {"index": index, "function": {"arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        return [{"tool_calls": [head]}, {"tool_calls": [rest]}]

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is complete."""
        content = (self.content.strip() or None) if self.calls else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for name, call in self.calls
            ]
        return {"message": message, "logprobs": self._listed(self.entries), "finish_reason": self.finish_reason}

    def logprobs_of(self, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities of a piece's tokens, if they were asked for."""
        return self._listed(piece.logprobs or [])

    def _listed(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": [logprob_entry(self._service, entry) for entry in entries], "refusal": None}


def logprob_entry(service: Service, entry: TokenLogprob) -> dict[str, Any]:
    """A token with its log-probability, and those that were likely in its place."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        data = service.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    return named(entry.token_id, entry.logprob) | {"top_logprobs": [named(*each) for each in entry.top.items()]}


def finite(logprob: float | None) -> float | None:
    """As JSON can write it: a token that is impossible has -9999."""
    return None if logprob is None else max(logprob, -9999.0)


def call_id() -> str:
    """A new name for a call. Nine letters and digits: Mistral's template takes no other ids."""
    return secrets.token_hex(5)[:9]


def _read_logprobs(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    if fields.truth("logprobs", False):
        return top or 0
    if top:
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    return None


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream, options = fields.truth("stream", False), fields.inner("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise invalid("stream_options goes only with stream=true", "stream_options")
    with_usage = options.truth("include_usage", False)
    options.truth("include_obfuscation", False)
    options.refuse_others()
    return stream, with_usage


routes = [Route("/v1/chat/completions", chat, methods=["POST"])]

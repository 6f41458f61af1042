"""POST /v1/responses: OpenAI's newer protocol, of which texts are understood: a text or messages in, a message out.

No state is kept: `previous_response_id` and `conversation` are refused, and `store` changes nothing. What else is not
understood (tools, images, reasoning, ...) is refused by its name, rather than answered as if it were not there.

    response.created, .in_progress, .output_item.added, .content_part.added
    response.output_text.delta ...
    response.output_text.done, .content_part.done, .output_item.done, .completed | .incomplete | .failed
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...answer import FinishReason, Piece
from ...sampling import Grammar
from ..engine import Job
from .chat import MOST_LOGPROBS, logprob_entry
from .errors import ApiError, invalid
from .fields import IGNORED, Fields, attempt, check_schema, read_fields, read_sampling, read_stop
from .gate.logs import note
from .service import Answers, Service
from .streams import EventStream, event

# What may be included. All but the first are parts of what is not here.
INCLUDED = (
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
_ROLES = ("user", "assistant", "system", "developer")
# Fields that ask for what is not here, each with what to do instead.
REFUSED = {
    "previous_response_id": "no state is kept here: send the whole conversation as input",
    "conversation": "no state is kept here: send the whole conversation as input",
    "prompt": "no prompts are kept here: send the text as input",
    "tools": "tools are for /v1/chat/completions",
    "max_tool_calls": "tools are for /v1/chat/completions",
    "moderation": "there is no moderation here",
}


# What is the same in every response: much of the protocol is about what is not here.
_SAME = {
    "object": "response",
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "output": [],
    "parallel_tool_calls": False,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "truncation": "disabled",
    "usage": None,
}


@dataclasses.dataclass
class _Response:
    """A response while it is written.

    Attributes:
      begun: the object, as it is at the beginning.
      read: tokens of the prompt.
      text, written, logprobs, reason: of the answer so far.
      item: the message's id.
    """

    begun: dict[str, Any]
    request: Request
    service: Service
    answers: Answers
    read: int
    text: str = ""
    written: int = 0
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None
    item: str = dataclasses.field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")

    def add(self, piece: Piece) -> None:
        """Adds a piece of the answer."""
        self.text, self.written = self.text + piece.text, self.written + len(piece.token_ids)
        self.logprobs += [logprob_entry(self.service, entry) for entry in piece.logprobs or []]
        self.reason = piece.finish_reason

    def part(self) -> dict[str, Any]:
        """The text, as a part of the message."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def message(self, status: str) -> dict[str, Any]:
        """The message; it has no parts before there is an answer."""
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def ended(self) -> dict[str, Any]:
        """The object at the end."""
        status = "completed" if self.reason == "stop" else "incomplete"
        cached = self.answers.tickets[0].reused
        note(self.request.scope, completion_tokens=self.written, cached_tokens=cached, finish=self.reason)
        usage = {
            "input_tokens": self.read,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.read + self.written,
        }
        ended = {"status": status, "output": [self.message(status)], "usage": usage}
        if status == "completed":
            return {**self.begun, **ended, "completed_at": int(time.time())}
        return {**self.begun, **ended, "incomplete_details": {"reason": "max_output_tokens"}}


async def respond(request: Request) -> Response:
    """The endpoint."""
    service: Service = request.app.state.service
    service.check_ready()
    fields = await read_fields(request)
    model, stream = fields.text("model", service.model), fields.truth("stream", False)
    adapter = service.adapter_of(model)
    messages, most = _messages(fields, service.limits.messages), fields.whole("max_output_tokens", None, 1, 2**31 - 1)
    sampling, stop = read_sampling(fields, service.sampling), read_stop(fields)
    (form, grammar), logprobs = _read_format(fields), _read_logprobs(fields)
    _refuse(fields)
    prompt = await service.encode_chat(messages, param="input")
    room = service.room_for(prompt, "input")
    note(request.scope, model=model, prompt_tokens=len(prompt), stream=stream)
    if service.log_prompts:
        note(request.scope, messages=messages)
    head = {
        "id": f"resp_{secrets.token_hex(16)}",
        "created_at": int(time.time()),
        "instructions": fields.get("instructions"),
        "max_output_tokens": most,
        "metadata": fields.get("metadata") or {},
        "model": model,
        "temperature": sampling.temperature,
        "top_logprobs": logprobs or 0,
        "text": {"format": form},
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "user": fields.get("user"),
    }
    answers = await service.open(
        Job(prompt, min(most or room, room), sampling, stop, grammar, logprobs, adapter=adapter)
    )
    response = _Response(_SAME | head, request, service, answers, len(prompt))
    if stream:
        events = _Events(response)
        return EventStream(events.all(), answers.close, service.limits.keep_alive, events.failed)
    try:
        async for piece in answers:
            response.add(piece)
    finally:
        answers.close()
    return JSONResponse(response.ended())


def _messages(fields: Fields, most: int) -> list[dict[str, str]]:
    """The conversation, as `encode_chat` takes it; instructions are its system message."""
    instructions = fields.text("instructions", None)
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    value = fields.required("input")
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    items = fields.items("input", most) or []
    if not items:
        raise invalid("input is an empty list: give it a text, or messages", "input")
    return messages + [_message(Fields(item, f"input[{index}]")) for index, item in enumerate(items)]


def _message(item: Fields) -> dict[str, str]:
    item.only("type", "message")
    role = item.one_of("role", _ROLES, None)
    if role is None:
        raise item.wrong("role", " or ".join(f'"{each}"' for each in _ROLES))
    content = item.required("content")
    for name in ("id", "status", "phase"):  # of messages that were answers
        item.text(name, None)
    item.refuse_others()
    if (parts := item.parts("content")) is not None:
        content = "".join(map(_part, parts))
    elif not isinstance(content, str):
        raise item.wrong("content", "a text, or a list of parts")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Fields) -> str:
    part.only("type", "input_text", "output_text", "text")
    text = part.required("text")
    if not isinstance(text, str):
        raise part.wrong("text", "a text")
    part.refuse_others(("annotations", "logprobs"))
    return text


def _read_format(fields: Fields) -> tuple[dict[str, Any], Grammar | None]:
    """text.format -> (itself, what the answer has to match)."""
    text = fields.inner("text")
    form = None if text is None else text.inner("format")
    grammar, kept = None, {"type": "text"}
    if form is not None:
        kept = fields.get("text")["format"]
        form.required("type")
        kind = form.one_of("type", ("text", "json_object", "json_schema"), "")
        schema = {"type": "object"} if kind == "json_object" else None
        if kind == "json_schema":
            schema = form.required("schema")
            form.text("name", ""), form.text("description", ""), form.truth("strict", False)
            check_schema(schema, "text.format.schema")
        form.refuse_others()
        if schema is not None:
            grammar = attempt(lambda: Grammar.json_schema(schema), "text.format.schema")
    if text is not None:
        text.refuse_others(("verbosity",))
    return kept, grammar


def _read_logprobs(fields: Fields) -> int | None:
    """How many likely tokens are listed with each; None lists nothing. What else may be included, never is there."""
    top, include = fields.whole("top_logprobs", None, 0, MOST_LOGPROBS), fields.items("include", len(INCLUDED)) or []
    if not all(isinstance(each, str) and each in INCLUDED for each in include):
        raise fields.wrong("include", f"a list of {', '.join(INCLUDED)}")
    return top or 0 if INCLUDED[0] in include or top else None


def _refuse(fields: Fields) -> None:
    """Raises ApiError (400) for what is not understood."""
    for name, remedy in REFUSED.items():
        if fields.get(name) not in (None, [], {}):
            raise invalid(f"{name} is not supported: {remedy}", name, "unsupported_value")
    for name, values in (
        ("background", [False]),
        ("truncation", ["disabled"]),
        ("tool_choice", ["none", "auto"]),
    ):
        fields.only(name, *values)
    if (options := fields.inner("stream_options")) is not None:
        options.truth("include_obfuscation", False)
        options.refuse_others()
    fields.truth("parallel_tool_calls", False)
    fields.refuse_others((*IGNORED, "user", "metadata"))


class _Events:
    """The stream of a response."""

    def __init__(self, response: _Response):
        self._response, self._count = response, 0

    def _event(self, kind: str, **values: Any) -> bytes:
        self._count += 1
        return event({"type": kind, "sequence_number": self._count - 1, **values}, kind)

    async def all(self) -> AsyncIterator[bytes]:
        """The events, in their order."""
        response, tell = self._response, self._event
        place = {"item_id": response.item, "output_index": 0, "content_index": 0}
        yield tell("response.created", response=response.begun)
        yield tell("response.in_progress", response=response.begun)
        yield tell("response.output_item.added", output_index=0, item=response.message("in_progress"))
        yield tell("response.content_part.added", **place, part=response.part())
        shown = 0  # of the entries: those of a character that is not complete come with it
        async for piece in response.answers:
            response.add(piece)
            if piece.text:
                logprobs, shown = response.logprobs[shown:], len(response.logprobs)
                yield tell("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)
        ended = response.ended()
        yield tell("response.output_text.done", **place, text=response.text, logprobs=response.logprobs)
        yield tell("response.content_part.done", **place, part=response.part())
        yield tell("response.output_item.done", output_index=0, item=ended["output"][0])
        yield tell(f"response.{ended['status']}", response=ended)

    def failed(self, error: ApiError) -> bytes:
        """The last event, if the answer cannot go on."""
        told = {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=self._response.begun | told)


routes = [Route("/v1/responses", respond, methods=["POST"])]

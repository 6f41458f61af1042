"""Enough of ollama's protocol for editors and front ends: /api/chat, /api/generate, /api/version. models.py: /api/tags.

Answers are streamed as lines of JSON unless a request says `"stream": false`. Fields that ask for what is not here
(images, tools, ...) are refused by name; those about memory and loading (`keep_alive`, `num_ctx`, ...) change nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from ...sampling import Grammar
from ..engine import Job
from .errors import ApiError
from .fields import Fields, attempt, check_schema, read_fields, read_messages, read_sampling, read_stop
from .gate.logs import note
from .service import Answers, Service
from .streams import EventStream

IGNORED = ("keep_alive", "truncate", "shift")
IGNORED_OPTIONS = (
    "num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "repeat_last_n", "numa",
    "low_vram", "f16_kv", "vocab_only", "use_mlock", "logits_all", "embedding_only",
)  # fmt: skip
_NDJSON = "application/x-ndjson"
Told = dict[str, Any]
Line = Callable[[str], Told]  # what a piece of text is in a line
Answer = Callable[[partial[Any], Line], Awaitable[Response]]  # what encodes the prompt -> its answer
Endpoint = Callable[[Service, Fields, Answer], Awaitable[Response]]


async def chat(service: Service, fields: Fields, answer: Answer) -> Response:
    """A conversation -> the next message."""
    messages = [] if fields.get("messages") == [] else read_messages(fields, service.limits.messages)
    fields.only("tools", [])
    encode = partial(service.encode_chat, messages)
    return await answer(encode, lambda text: {"message": {"role": "assistant", "content": text}})


async def generate(service: Service, fields: Fields, answer: Answer) -> Response:
    """A question, or with `raw` a text to go on with -> the answer."""
    prompt, system, raw = fields.text("prompt", ""), fields.text("system", ""), fields.truth("raw", False)
    for name in ("suffix", "template", "context", "images"):
        fields.only(name, "", [])
    said = (("system", system), ("user", prompt)) if prompt else ()
    messages = [{"role": role, "content": text} for role, text in said if text]
    encode = partial(service.encode, prompt, add_eos=False) if raw else partial(service.encode_chat, messages)
    return await answer(encode, lambda text: {"response": text})


async def version_(request: Request) -> Response:
    """Ours."""
    return JSONResponse({"version": version("phi3_jax")})


def _endpoint(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The same for requests, with errors in ollama's form."""

    async def answered(request: Request) -> Response:
        try:
            service: Service = request.app.state.service
            service.check_ready()
            fields = await read_fields(request, any_type=True)
            return await endpoint(service, fields, partial(_answer, request, fields))
        except ApiError as error:
            return JSONResponse({"error": error.message}, error.status, error.headers)

    return answered


async def _answer(request: Request, fields: Fields, encode: partial[Any], line: Line) -> Response:
    service: Service = request.app.state.service
    begin, model = time.perf_counter_ns(), str(fields.required("model"))
    adapter = service.adapter_of(model.removesuffix(":latest"))
    fields.only("think", False)
    stream, grammar, options = fields.truth("stream", True), _grammar(fields), fields.get("options")
    if isinstance(options, dict) and "repeat_penalty" in options and "repetition_penalty" not in options:
        options["repetition_penalty"] = options.pop("repeat_penalty")
    chosen = Fields({} if options is None else options, "options")
    most = chosen.whole("num_predict", -1, -2, 2**31 - 1)  # below 1: as many as there is room for
    sampling, stop = read_sampling(chosen, service.sampling), read_stop(chosen)
    chosen.refuse_others(IGNORED_OPTIONS)
    fields.refuse_others(IGNORED)
    if not encode.args[0]:  # nothing is asked: a client wants the model to be in memory, where it is
        return JSONResponse({"model": model, "created_at": _now(), **line(""), "done": True, "done_reason": "load"})
    prompt = await encode()
    room = service.room_for(prompt)
    note(request.scope, model=model, prompt_tokens=len(prompt), stream=stream)
    if service.log_prompts:
        note(request.scope, prompts=encode.args)
    job = Job(prompt, min(most, room) if most > 0 else room, sampling, stop, grammar, adapter=adapter)
    answers = await service.open(job)
    lines = _lines(answers, {"model": model}, len(prompt), begin, line, request.scope)
    if stream:
        chunks = (_json(each) async for each in lines)
        return EventStream(chunks, answers.close, 0, lambda error: _json({"error": error.message}), _NDJSON)
    try:
        told = [each async for each in lines]
    finally:
        answers.close()
    text = "".join(each["message"]["content"] if "message" in each else each["response"] for each in told)
    return JSONResponse({**told[-1], **line(text)})


async def _lines(answers: Answers, head: Told, read: int, begin: int, line: Line, scope: Scope) -> AsyncIterator[Told]:
    first, written, reason = begin, 0, "stop"
    async for piece in answers:
        first = first if written else time.perf_counter_ns()
        written += len(piece.token_ids)
        reason = piece.finish_reason or reason
        if piece.text:
            yield {**head, "created_at": _now(), **line(piece.text), "done": False}
    now, reason = time.perf_counter_ns(), "stop" if reason == "stop" else "length"
    note(scope, completion_tokens=written, cached_tokens=answers.tickets[0].reused, finish=reason)
    times = {"total_duration": now - begin, "load_duration": 0, "prompt_eval_count": read}
    times |= {"prompt_eval_duration": first - begin, "eval_count": written, "eval_duration": now - first}
    yield {**head, "created_at": _now(), **line(""), "done": True, "done_reason": reason, **times}


def _json(value: Told) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _grammar(fields: Fields) -> Grammar | None:
    if (form := fields.get("format")) in (None, ""):
        return None
    schema = {"type": "object"} if form == "json" else form
    check_schema(schema, "format")
    return attempt(lambda: Grammar.json_schema(schema), "format")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


routes = [
    Route("/api/chat", _endpoint(chat), methods=["POST"]),
    Route("/api/generate", _endpoint(generate), methods=["POST"]),
    Route("/api/version", version_),
]

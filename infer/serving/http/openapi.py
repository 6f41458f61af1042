"""GET /openapi.json: what this server understands, as OpenAPI 3.1 describes it.

Bounds are those that fields/ and the endpoints hold requests to; a test compares the two. What depends on two fields
at once (`top_logprobs` needs `logprobs`, ...) cannot be said here; the errors say it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..engine.pooling import POOLINGS
from . import chat, embeddings, fields, ollama, responses
from .service import Service

Schema = dict[str, Any]
_ANYTHING: Schema = {}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_OBJECT: Schema = {"type": "object"}


def describe(service: Service) -> Schema:
    """The whole description of a server."""
    names, limits = [service.model, *service.adapters], service.limits
    known = {"model": _one_of(*names)}
    asked = known | _sampling() | dict.fromkeys(fields.IGNORED, _ANYTHING)
    messages = {**_list(_message(), limits.messages), "type": "array", "minItems": 1}
    tools = _tools(limits.tools)
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": service.tokenizer.vocab_size - 1}}
    tagged = {"model": {"enum": [*names, *(f"{name}:latest" for name in names)]}}
    chat_fields = asked | _answering(limits.choices, 1) | _chat() | tools | {"messages": messages}
    text_fields = asked | _answering(limits.choices, 0) | _goes_on(limits.choices)
    response_fields, embedding_fields = asked | _responses(limits.messages), _embeddings(service)
    tokenized = known | {"return_token_strs": _truth()}
    text = _object(tokenized | {"prompt": {"type": "string"}, "add_special_tokens": _truth()}, ["prompt"])
    talk = tokenized | tools | {"messages": messages, "add_generation_prompt": _truth()}
    talk |= {"chat_template_kwargs": {"type": ["object", "null"]}}
    tokens = {"anyOf": [text, _object(talk, ["messages"])]}
    paths = {
        "/v1/chat/completions": _post("Answers a conversation", chat_fields, ["messages"], _ANSWER, _EVENTS),
        "/v1/completions": _post("Goes on with texts", text_fields, ["prompt"], _ANSWER, _EVENTS),
        "/v1/responses": _post("Answers a conversation", response_fields, ["input"], _RESPONSE, _EVENTS),
        "/v1/embeddings": _post("Texts as vectors", embedding_fields, ["input"], _EMBEDDINGS),
        "/v1/models": _get("The models", _MODELS),
        "/v1/models/{name}": _get("A model", _MODEL, parameter={"type": "string", "enum": names}),
        "/tokenize": _post_any("The token ids of a text or a conversation", tokens, _TOKENS),
        "/detokenize": _post("The text of token ids", known | {"tokens": ids}, ["tokens"], _says(prompt="string")),
        "/api/chat": _post("Ollama: a conversation", tagged | _ollama(messages), ["model", "messages"], _LINE, _LINES),
        "/api/generate": _post("Ollama: a question", tagged | _ollama(), ["model"], _LINE, _LINES),
        "/api/tags": _get("Ollama: the models", _says(models="array")),
        "/api/version": _get("Ollama: our version", _says(version="string")),
        "/health": _get("Whether the server works", _says(status="string")),
        "/ready": _get("Whether it answers", _says(status="string")),
        "/metrics": _get("Numbers for Prometheus", {"type": "string"}, "text/plain"),
        "/openapi.json": _get("This description", _OBJECT),
    }
    info = {"title": "phi3-serve", "version": version("phi3_jax"), "license": {"name": "Apache-2.0"}}
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    components = {"schemas": {"Error": _ERROR}, "securitySchemes": schemes}
    return {
        "openapi": "3.1.0",
        "info": info,
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": components,
    }


def _answering(choices: int, least: int) -> Schema:
    """The fields that chat and completions share, beside those of sampling; answers have at least so many tokens."""
    return {
        "stream": _truth(),
        "stream_options": _object({name: _truth() for name in _STREAM_OPTIONS}),
        "n": _whole(1, choices),
        "max_tokens": _whole(least, 2**31 - 1),
        "max_completion_tokens": _whole(least, 2**31 - 1),
        "response_format": _response_format(),
        "structured_outputs": _object(
            {
                "regex": _text() | {"maxLength": fields.LONGEST_PATTERN},
                "choice": _list({"type": "string"}, fields.MOST_OPTIONS) | {"minItems": 1},
                "json": {"type": ["object", "null"]},
            }
        ),
    }


def _chat() -> Schema:
    return {
        "logprobs": _truth(),
        "top_logprobs": _whole(0, chat.MOST_LOGPROBS),
        "modalities": {"enum": [["text"], None]},
        "audio": {"type": "null"},
        "prediction": {"type": "null"},
        "reasoning_effort": _one_of("none"),
        "chat_template_kwargs": {"type": ["object", "null"]},
    }


def _tools(most: int) -> Schema:
    tool = _object({"type": _one_of("function"), "function": _function()}, ["function"], closed=False)
    return {
        "tools": _list(tool, most),
        "tool_choice": {"anyOf": [_one_of("none", "auto", "required"), _TOOL_CHOICE]},
        "parallel_tool_calls": _truth(),
    }


def _goes_on(choices: int) -> Schema:
    """The fields of /v1/completions that chat does not have."""
    one: list[Schema] = [{"type": "string"}, _IDS]
    several = [{"type": "array", "items": each, "minItems": 1, "maxItems": choices} for each in one]
    return {
        "prompt": {"anyOf": one + several},
        "best_of": _whole(1, choices),
        "logprobs": _whole(0, chat.MOST_LOGPROBS),
        "echo": _truth(),
        "suffix": _one_of(""),
    }


def _embeddings(service: Service) -> Schema:
    one: list[Schema] = [{"type": "string", "minLength": 1}, _IDS]
    several = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": embeddings.MOST_INPUTS}
    return dict.fromkeys(fields.IGNORED, _ANYTHING) | {
        "model": _one_of(service.model, *service.adapters),
        "input": {"anyOf": [*one, several]},
        "encoding_format": _one_of("float", "base64"),
        "dimensions": {"enum": [service.checkpoint.config.hidden_size, None]},
        "pooling": _one_of(*POOLINGS),
    }


def _sampling() -> Schema:
    """What `fields.read_sampling` and `fields.read_stop` take."""
    stop = {"type": "string", "minLength": 1, "maxLength": fields.LONGEST_STOP}
    bias = {"type": ["object", "null"], "maxProperties": fields.MOST_BIASES}
    bias |= {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}, "additionalProperties": _number(-100, 100, False)}
    return {
        "temperature": _number(0, 2),
        "top_p": _share(),
        "top_k": _whole(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "typical_p": _share(),
        "repetition_penalty": _number(0.01, 100),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "min_tokens": _whole(0, 2**31 - 1),
        "logit_bias": bias,
        "seed": _whole(-(2**63), 2**63 - 1),
        "stop": {"anyOf": [stop, _list(stop, fields.MOST_STOPS)]},
    }


def _message() -> Schema:
    part = _object({"type": _one_of("text"), "text": {"type": "string"}}, ["text"], closed=False)
    told = {"name": _text(), "arguments": {"type": ["string", "object", "null"]}}
    function = {**_object(told, closed=False), "type": "object"}
    call = _object({"id": _text(), "type": _one_of("function"), "function": function}, ["function"], closed=False)
    content = [{"type": "string"}, {**_list(part), "type": "array"}]
    rest = {name: _text() for name in ("name", "tool_call_id", "reasoning_content")}
    rest |= {"tool_calls": _list(call, 128), "refusal": _ANYTHING, "annotations": _ANYTHING}
    others = {"role": {"enum": ["system", "developer", "user", "tool"]}, "content": {"anyOf": content}}
    own = {"role": {"enum": ["assistant"]}, "content": {"anyOf": [*content, {"type": "null"}]}}
    return {"anyOf": [_object(others | rest, ["role", "content"]), _object(own | rest, ["role"])]}


def _function() -> Schema:
    name = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
    rest = {"description": _text(), "parameters": {"type": ["object", "null"]}, "strict": _truth()}
    return _object({"name": name, **rest}, ["name"])


def _response_format() -> Schema:
    described = _or_null(_object({"schema": _OBJECT}, ["schema"], closed=False))
    kinds = {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": described}
    return _or_null(_object(kinds, ["type"], closed=False))


def _responses(most: int) -> Schema:
    """The fields of /v1/responses that are not those of sampling."""
    part = {"type": {"enum": ["input_text", "output_text", "text", None]}, "text": {"type": "string"}}
    parts = _list(_object({**part, "annotations": _ANYTHING, "logprobs": _ANYTHING}, ["text"]))
    item = {
        "type": _one_of("message"),
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [{"type": "string"}, {**parts, "type": "array"}]},
        **{name: _text() for name in ("id", "status", "phase")},
    }
    items = {"type": "array", "items": _object(item, ["role", "content"]), "minItems": 1, "maxItems": most}
    form = {"type": {"enum": ["text", "json_object", "json_schema"]}, "schema": {"type": ["object", "null"]}}
    form |= {"name": _text(), "description": _text(), "strict": _truth()}
    nothing: Schema = {"enum": [None, [], {}]}
    return {
        "input": {"anyOf": [{"type": "string"}, items]},
        "instructions": _text(),
        "max_output_tokens": _whole(1, 2**31 - 1),
        "text": _object({"format": _or_null(_object(form, ["type"])), "verbosity": _ANYTHING}),
        "stream": _truth(),
        "stream_options": _object({"include_obfuscation": _truth()}),
        "parallel_tool_calls": _truth(),
        "background": {"enum": [False, None]},
        "truncation": _one_of("disabled"),
        "tool_choice": _one_of("none", "auto"),
        "top_logprobs": _whole(0, chat.MOST_LOGPROBS),
        "include": _list({"enum": [*responses.INCLUDED]}, len(responses.INCLUDED)),
        **dict.fromkeys(responses.REFUSED, nothing),
    }


def _ollama(messages: Schema | None = None) -> Schema:
    options = _sampling() | {"num_predict": _whole(-2, 2**31 - 1), "repeat_penalty": _number(0.01, 100)}
    options |= dict.fromkeys(ollama.IGNORED_OPTIONS, _ANYTHING)
    shared: Schema = {
        "stream": _truth(),
        "format": {"anyOf": [{"enum": ["json", "", None]}, _OBJECT]},
        "options": _object(options),
        "think": {"enum": [False, None]},
        **dict.fromkeys(ollama.IGNORED, _ANYTHING),
    }
    if messages is not None:
        return shared | {"messages": {**messages, "minItems": 0}, "tools": {"enum": [[], None]}}
    empty: Schema = {name: {"enum": ["", [], None]} for name in ("suffix", "template", "context", "images")}
    return shared | empty | {"prompt": _text(), "system": _text(), "raw": _truth()}


# The forms of a field. Each may be null, which is the same as leaving it out.


def _text() -> Schema:
    return {"type": ["string", "null"]}


def _truth() -> Schema:
    return {"type": ["boolean", "null"]}


def _whole(least: int, most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _number(least: float, most: float, nullable: bool = True) -> Schema:
    return {"type": ["number", "null"] if nullable else "number", "minimum": least, "maximum": most}


def _share() -> Schema:
    """A number in (0, 1]."""
    return {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}


def _one_of(*options: str) -> Schema:
    return {"enum": [*options, None]}


def _list(items: Schema, most: int | None = None) -> Schema:
    return {"type": ["array", "null"], "items": items} | ({} if most is None else {"maxItems": most})


def _object(properties: Schema, required: list[str] | None = None, closed: bool = True) -> Schema:
    """An object, which may be null if nothing in it is required."""
    kind = ["object", "null"] if required is None else "object"
    schema = {"type": kind, "properties": properties, "required": required or []}
    return {**schema, "additionalProperties": False} if closed else schema


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _says(**properties: str) -> Schema:
    """An object of an answer: its properties, all of which are there, and their types."""
    told = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": told, "required": list(told)}


def _post(summary: str, body: Schema, required: list[str], answer: Schema, stream: str | None = None) -> Schema:
    return _post_any(summary, _object(body, required), answer, stream)


def _post_any(summary: str, body: Schema, answer: Schema, stream: str | None = None) -> Schema:
    content: Schema = {"application/json": {"schema": answer}}
    if stream is not None:
        content[stream] = {}
    asked = {"application/json": {"schema": body}}
    operation = {"summary": summary, "requestBody": {"required": True, "content": asked}}
    return {"post": operation | {"responses": _answers(content)}}


def _get(summary: str, answer: Schema, kind: str = "application/json", parameter: Schema | None = None) -> Schema:
    operation: Schema = {"summary": summary, "responses": _answers({kind: {"schema": answer}})}
    if parameter is not None:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": parameter}]
    return {"get": operation}


def _answers(content: Schema) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "Done", "content": content}, "default": {"description": "Why not", "content": error}}


_STREAM_OPTIONS = ("include_usage", "include_obfuscation")
_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
_TOOL_CHOICE = _object({"type": _one_of("function"), "function": _says(name="string")}, ["function"])
_ANSWER = _says(id="string", object="string", created="integer", model="string", choices="array", usage="object")
_RESPONSE = _says(id="string", object="string", created_at="integer", status="string", output="array", usage="object")
_EMBEDDINGS = _says(object="string", model="string", data="array", usage="object")
_MODEL = _says(id="string", object="string", created="integer", owned_by="string")
_MODELS = _says(object="string", data="array")
_TOKENS = _says(count="integer", max_model_len="integer", tokens="array")
_LINE = _says(model="string", created_at="string", done="boolean", done_reason="string", eval_count="integer")
# OpenAI's form, an object; ollama's is a text; and health and ready say their status.
_ERROR: Schema = {
    "type": "object",
    "properties": {"error": {"type": ["object", "string"]}, "status": {"type": "string"}},
}


async def openapi(request: Request) -> Response:
    """The endpoint."""
    return JSONResponse(describe(request.app.state.service))


routes = [Route("/openapi.json", openapi)]

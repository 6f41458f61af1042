"""/tokenize and /detokenize: text <-> token ids, as vLLM's server has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from phi3_jax.json_files import is_whole

from .errors import invalid
from .fields import as_whole, read_fields, read_messages, read_template_options, read_tool_use
from .service import Service

_MOST_IDS = 1 << 18


async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of a conversation as the model would read it."""
    service: Service = request.app.state.service
    fields = await read_fields(request)
    service.adapter_of(fields.text("model", service.model))
    with_strings = fields.truth("return_token_strs", False)
    if fields.get("messages") is not None:
        messages = read_messages(fields, service.limits.messages)
        use = read_tool_use(fields, service.limits.tools)
        generation = fields.truth("add_generation_prompt", True)
        options = read_template_options(fields)
        fields.refuse_others()
        ids = await service.encode_chat(messages, use.shown, add_generation_prompt=generation, template_options=options)
    else:
        fields.required("prompt")
        prompt = fields.text("prompt", "")
        special = fields.truth("add_special_tokens", True)
        fields.refuse_others()
        ids = await service.encode(prompt, add_bos=None if special else False, add_eos=False)
    strings = [service.token_bytes(token).decode("utf-8", "replace") for token in ids] if with_strings else None
    return JSONResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings})


async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens included."""
    service: Service = request.app.state.service
    fields = await read_fields(request)
    service.adapter_of(fields.text("model", service.model))
    fields.required("tokens")
    ids = [as_whole(token) for token in fields.items("tokens", _MOST_IDS) or []]
    fields.refuse_others()
    if odd := [token for token in ids if not is_whole(token, 0, service.tokenizer.vocab_size - 1)]:
        raise invalid(f"tokens has {str(odd[0])[:40]}, which is no id of {service.tokenizer.vocab_size}", "tokens")
    return JSONResponse({"prompt": await service.in_thread(service.tokenizer.decode, ids, param="tokens")})


routes = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]

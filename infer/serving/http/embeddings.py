"""POST /v1/embeddings: texts -> vectors of length 1, pooled from the model's last hidden states.

The field `pooling` is ours: "mean", or "last" for the state at the last token, which alone has seen the whole text. The
program says what is meant where a request leaves it open. `dimensions` may only be the model's own: vectors can be cut
where a model was trained for it.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phi3_jax.json_files import is_whole

from ..engine import QueueFull
from ..engine.pooling import POOLINGS
from .errors import invalid, too_many, unavailable
from .fields import IGNORED, Fields, as_whole, read_fields
from .gate.logs import note
from .service import Service
from .streams import listing

MOST_INPUTS = 2048  # of one request, as at OpenAI
MOST_TOKENS = 300_000  # of all inputs of one request, likewise


async def embed(request: Request) -> Response:
    """The endpoint."""
    service: Service = request.app.state.service
    service.check_ready()
    fields = await read_fields(request)
    model = fields.text("model", service.model)
    adapter = service.adapter_of(model)
    pooling: Any = fields.one_of("pooling", POOLINGS, service.pooling)
    encoding = fields.one_of("encoding_format", ("float", "base64"), "float")
    size = service.checkpoint.config.hidden_size
    if fields.whole("dimensions", size, 1, 2**31 - 1) != size:
        message = f"dimensions must be {size}, or left out: the model was not trained for shorter vectors"
        raise invalid(message, "dimensions", "unsupported_value")
    inputs = _inputs(fields)
    fields.refuse_others(IGNORED)
    texts = [await _tokens(service, value, index) for index, value in enumerate(inputs)]
    if (count := sum(map(len, texts))) > MOST_TOKENS:
        raise invalid(f"input has {count} tokens, more than {MOST_TOKENS}: split it", "input")
    note(request.scope, model=model, prompt_tokens=count)
    if service.log_prompts:
        note(request.scope, prompts=inputs)
    service.metrics.embedded.inc(count)
    vectors = await _embed(service, texts, pooling, adapter)
    data = (
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": count, "total_tokens": count}
    return await listing({"object": "list", "model": model, "usage": usage}, "data", data)


def _inputs(fields: Fields) -> list[str | list[int]]:
    """The inputs, each a text or a list of token ids."""
    value = fields.required("input")
    given = value if isinstance(value, list) else [value]
    if (count := sum(len(each) for each in given if isinstance(each, list)) + len(given)) > MOST_TOKENS:
        raise invalid(f"input has {count} entries, more than {MOST_TOKENS}: split it", "input")
    if isinstance(value, list) and value and all(is_whole(as_whole(each)) for each in given):
        given = [given]
    inputs = [list(map(as_whole, each)) if isinstance(each, list) else each for each in given]
    for each in inputs:
        if not isinstance(each, str) and not (isinstance(each, list) and all(map(is_whole, each))):
            raise fields.wrong("input", "a text, a list of texts, a list of token ids, or a list of such lists")
        if not each:
            raise invalid("input has a text or a list that is empty", "input")
    if not 1 <= len(inputs) <= MOST_INPUTS:
        raise invalid(f"input has {len(inputs)} entries; it may have 1 to {MOST_INPUTS}", "input")
    return inputs


async def _tokens(service: Service, value: str | list[int], index: int) -> list[int]:
    if isinstance(value, list):
        return value
    return await service.encode(value, f"input[{index}]", add_eos=False)


async def _embed(service: Service, texts: list[list[int]], pooling: Any, adapter: str | None) -> np.ndarray:
    """float32 [len(texts), D]. If this is cancelled, so is what was asked of the engine."""
    try:
        async with asyncio.timeout(service.limits.request_seconds):
            return await asyncio.wrap_future(service.engine.submit_embedding(texts, pooling, adapter))
    except TimeoutError:
        raise unavailable("the texts were not read in time: give fewer, or try again") from None
    except ValueError as error:
        raise invalid(str(error), "input") from None
    except RuntimeError as error:  # what waits is told so
        raise unavailable(str(error)) from None
    except QueueFull as error:
        raise too_many(str(error)) from None


def _encoded(vector: np.ndarray, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


routes = [Route("/v1/embeddings", embed, methods=["POST"])]

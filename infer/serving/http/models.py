"""/v1/models: the names that requests may give; and /health and /ready, for whoever watches over the server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .service import Service


def _described(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "phi3_jax",
        "root": service.model,
        "parent": None if name == service.model else service.model,
        "max_model_len": service.context,
    }


async def models(request: Request) -> Response:
    """All of them, the model's own first."""
    service: Service = request.app.state.service
    data = [_described(service, name) for name in (service.model, *service.adapters)]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    service.adapter_of(name)  # raises for one that is not there
    return JSONResponse(_described(service, name))


async def tags(request: Request) -> Response:
    """All of them, in ollama's protocol."""
    service: Service = request.app.state.service
    since = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
    empty = {"modified_at": since, "size": 0, "digest": "", "details": {}}
    models = [{"name": name, "model": name, **empty} for name in (service.model, *service.adapters)]
    return JSONResponse({"models": models})


async def health(request: Request) -> Response:
    """Whether the process does what it should: 200, also while it warms up; 503 once it failed."""
    service: Service = request.app.state.service
    return JSONResponse({"status": service.state}, 503 if service.state == "failed" else 200)


async def ready(request: Request) -> Response:
    """Whether it takes requests: 200, else 503."""
    service: Service = request.app.state.service
    is_ready = service.state == "ready"
    headers = None if is_ready else {"retry-after": "2"}
    return JSONResponse({"status": service.state}, 200 if is_ready else 503, headers)


routes = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/api/tags", tags),
    Route("/health", health),
    Route("/ready", ready),
]

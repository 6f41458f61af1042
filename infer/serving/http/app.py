"""The app: the endpoints, and around them the layers that every request goes through.

    Logged -> (CORS) -> Errors -> Origins -> Authentication -> Bodies -> endpoint

An endpoint is a file with `routes`; ENDPOINTS lists these files.
"""

from __future__ import annotations

from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from . import chat, completions, embeddings, metrics, models, ollama, openapi, responses, texts
from .errors import ApiError
from .gate.keys import Access
from .gate.layers import Authentication, Bodies, Errors, Origins
from .gate.logs import Logged
from .service import Service

ENDPOINTS = (chat, completions, responses, embeddings, models, texts, ollama, metrics, openapi)

_PAGE = resources.files(__package__.rpartition(".")[0]) / "page"
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# The page may load only its own files, and show images only that stand in it; nothing of an answer can run.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",  # no function that reads text as HTML works there
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_app(service: Service, access: Access | None = None) -> Starlette:
    """The app of a service; by default only for this machine, where everyone may use it."""
    access = access or Access()
    paths = [route.path for endpoint in ENDPOINTS for route in endpoint.routes]
    layers = [Middleware(Logged), Middleware(metrics.Counted, metrics=service.metrics, paths=paths)]
    if access.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(access.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's own client sends a dozen of its own
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    layers += [
        Middleware(Errors),
        Middleware(Origins, hosts=access.hosts, origins=access.origins),
        Middleware(Authentication, keys=access.keys),
        Middleware(Bodies, limits=service.limits),
    ]
    routes: list[BaseRoute] = [route for endpoint in ENDPOINTS for route in endpoint.routes]
    routes += [Route("/", _page), Route("/page/{name}", _page)]
    app = Starlette(routes=routes, middleware=layers, exception_handlers={HTTPException: _refuse, ApiError: _tell})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, of a path or a method, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    where = f"{request.method[:20]} {request.url.path[:200]}"
    text = f"there is no {where}" if error.status_code in (404, 405) else error.detail
    return await _tell(request, ApiError(error.status_code, text, headers=error.headers))


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.as_json(), error.status, error.headers)


async def _page(request: Request) -> Response:
    """The chat page, and its files."""
    name = request.path_params.get("name", "index.html")
    kind = _TYPES.get(name.rpartition(".")[2])
    if kind is None or name not in {file.name for file in _PAGE.iterdir()}:  # a name may be anything, and too long
        raise ApiError(404, f"there is no {request.url.path[:200]}")
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers=_PAGE_HEADERS)

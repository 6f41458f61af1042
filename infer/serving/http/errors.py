"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}}, each with its HTTP status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What a client cannot know from the status alone: the kind of error in OpenAI's words.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
      status: of HTTP.
      headers: of the response, beside its type.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """The body, as an object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_bytes(self) -> bytes:
        """The body."""
        # Only ASCII: what a client sent may come back in the message, and a proxy may guess another encoding.
        return json.dumps(self.as_json()).encode()


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request makes no sense; `param` names the field that it is about."""
    return ApiError(400, message, param, code)


def too_many(message: str, seconds: int = 1) -> ApiError:
    """429: there is no room now; the client may try again after so many seconds."""
    return ApiError(429, message, headers={"retry-after": str(seconds)})


def unavailable(message: str, seconds: int = 2) -> ApiError:
    """503: the server does not answer yet, or no more; the client may try again after so many seconds."""
    return ApiError(503, message, headers={"retry-after": str(seconds)})

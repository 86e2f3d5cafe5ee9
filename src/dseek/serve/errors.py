"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`.

Messages may quote what a client sent, so JSON is written in ASCII: half a surrogate pair in a request never makes a
response that cannot be encoded.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dseek.core.errors import DseekError
from dseek.core.logs import get_logger

logger = get_logger("dseek.serve")

MAX_MESSAGE_CHARS = 500
"""Longer messages are cut: they may quote a client's own text."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was found, what was needed, what to do.
        param: the field that is wrong, or None.
        code: a short word for programs, or None.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object that is sent."""
        return {
            "error": {
                "message": self.message[:MAX_MESSAGE_CHARS],
                "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JsonResponse:
        """Make the response."""
        return JsonResponse(self.body(), status_code=self.status, headers=self.headers)


class JsonResponse(Response):
    """JSON in ASCII: any string that JSON can carry can be sent, whatever it holds."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write the content as JSON; numbers that are not finite are refused."""
        return dumps(content).encode("ascii")


def dumps(content: Any) -> str:
    """Write JSON in ASCII without spaces.

    Args:
        content: plain values.

    Returns:
        The text.
    """
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def as_api_error(error: BaseException) -> ApiError:
    """Word any exception for a client; what is not a client's fault is logged and not told.

    Args:
        error: what was raised.

    Returns:
        What to answer.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DseekError):
        return ApiError(400 if error.exit_status == 2 else 500, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than the server allows", code="timeout")
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return _failed()


def _failed() -> ApiError:
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of an application in this form.

    Args:
        app: the application.
    """

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    async def unknown(request: Request, error: Exception) -> Response:
        return _failed().response()  # the exception goes on to the doorman, who logs it

    async def known(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)
    for kind in (ApiError, DseekError, TimeoutError):
        app.add_exception_handler(kind, known)


def _validation_error(error: RequestValidationError) -> ApiError:
    """Say what is wrong with a body, without quoting it."""
    problems = error.errors()
    first = problems[0] if problems else {"loc": (), "msg": "the request is malformed", "type": "unknown"}
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        message, place = "the body is not JSON", ""
    shown = f"{place}: {message}" if place else message
    if len(problems) > 1:
        shown += f" (and {len(problems) - 1} more)"
    return ApiError(400, shown, param=place or None, code="invalid_value")

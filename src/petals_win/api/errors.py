"""Errors as clients expect them. Knows status codes and the JSON body of an error in each dialect; not who raises which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from petals_win.api.ascii_json import AsciiJson
from petals_win.engines.base import (
    ContextTooLong,
    EngineClosed,
    Full,
    ModelNotFound,
    SwarmFailed,
    SwarmFull,
    SwarmUnavailable,
)
from petals_win.errors import UserError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 10
_LONGEST_PARAM = 100  # characters: a key of an object may be anything


class ApiError(Exception):
    """An answer other than success: HTTP status, a sentence for people, and OpenAI's fields for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body in OpenAI's form, also sent as the last event of a stream that breaks."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer, in the form that those expect who ask for the path."""
        return _ErrorResponse(self)


def ollama_body(error: ApiError) -> dict[str, Any]:
    """The JSON body in Ollama's form, also sent as the last line of a stream that breaks."""
    return {"error": str(error)}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The JSON body in Anthropic's form, also sent as the last event of a stream that breaks."""
    others = "api_error" if error.status >= 500 else "invalid_request_error"
    return {
        "type": "error",
        "error": {"type": _ANTHROPIC_TYPES.get(error.status, others), "message": str(error)},
    }


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The form of errors below a path, where it is not OpenAI's; the first one that fits counts.
_FORMS: tuple[tuple[str, Callable[[ApiError], dict[str, Any]]], ...] = (
    ("/v1/messages", anthropic_body),
    ("/api/v1", ApiError.body),  # Petals' own names begin so, too
    ("/api/v2", ApiError.body),
    ("/api", ollama_body),
)


class _ErrorResponse(Response):
    """An error whose form is chosen when it is sent, since whoever raises it need not know who asked."""

    def __init__(self, error: ApiError):
        super().__init__(status_code=error.status)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) + "/"
        forms = (form for prefix, form in _FORMS if path.startswith(f"{prefix}/"))
        body = next(forms, ApiError.body)(self._error)
        await AsciiJson(body, self._error.status, self._error.headers)(scope, receive, send)


def from_engine(error: UserError) -> ApiError:
    """Translate what an engine raises. What is no fault of the request goes to the log, with what it came of."""
    translated = _translated(error)
    if translated.status >= 500:
        cause = f" ({error.__cause__!r})" if error.__cause__ is not None else ""
        logger.warning("Answered with status %d: %s%s", translated.status, error, cause)
    return translated


def _translated(error: UserError) -> ApiError:
    match error:
        case ModelNotFound():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case ContextTooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case SwarmUnavailable() | SwarmFailed():
            return ApiError(503, str(error), code="swarm_unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})
        case Full():
            code = "swarm_full" if isinstance(error, SwarmFull) else "full"
            return ApiError(503, str(error), code=code, headers={"Retry-After": str(RETRY_AFTER_S)})
        case EngineClosed():
            return ApiError(503, str(error), code="shutting_down")
        case _:
            return ApiError(400, str(error))


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return from_engine(error).response()


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this answer any more; 499 is what proxies write into their logs then."""
    return Response(status_code=499)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: no such route, wrong method, a body that is no text."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            message = f"There is no {what} here. /docs lists what there is."
        case 405:
            message = f"{what} is not possible: use {(error.headers or {}).get('Allow', 'another method')}."
        case 400 if isinstance(error.__cause__, UnicodeDecodeError):
            message = "The request body is not UTF-8 text. Send the JSON encoded in UTF-8."
        case 400:
            message = "The request body cannot be read as JSON."
        case _:
            message = str(error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_invalid_request(request: Request, error: Exception) -> Response:
    """A body of the wrong shape. Names the field, never repeats the value: it may be long or private."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = first["loc"][1:]
    if first["type"] == "json_invalid":
        reason, position = first["ctx"]["error"], location[0]
        return ApiError(400, f"The request body is not valid JSON: {reason}, character {position}.").response()
    if not location:
        kind = request.headers.get("content-type", "")
        status = 400 if _is_json(kind) else 415
        message = "The request body must be a JSON object, sent with 'Content-Type: application/json'."
        return ApiError(status, message).response()
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")[
        :_LONGEST_PARAM
    ]
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {reason[:1].lower()}{reason[1:]}.", param=param).response()


def _is_json(content_type: str) -> bool:
    """Whether the framework reads a body of this type as JSON; one without a type is none."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def on_defect(request: Request, error: Exception) -> Response:
    """A defect of ours: the server logs the traceback, the client learns only that it happened."""
    return ApiError(500, "An error inside petals-win; its log has the details.").response()

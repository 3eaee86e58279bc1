"""Errors in OpenAI's form: one table from error class to HTTP status, type and code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from duopool.core.errors import (
    DeadlineMissed,
    DuopoolError,
    InvalidRequest,
    ModelNotFound,
    OutOfBlocks,
    Overloaded,
    PromptTooLong,
    SlowReader,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)

RETRY_AFTER_S = 1.0


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    """The field that was refused."""
    code: str | None


class ErrorBody(TypedDict):
    """What every failed call answers, and what a stream that breaks says last."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class _Kind:
    status: HTTPStatus
    type: str
    code: str | None = None
    param: str | None = None
    """The field that is meant when the error itself names none."""


_INVALID = "invalid_request_error"
_KINDS: dict[type[Exception], _Kind] = {
    InvalidRequest: _Kind(HTTPStatus.BAD_REQUEST, _INVALID),
    PromptTooLong: _Kind(HTTPStatus.BAD_REQUEST, _INVALID, "context_length_exceeded"),
    Unauthenticated: _Kind(HTTPStatus.UNAUTHORIZED, _INVALID, "invalid_api_key"),
    ModelNotFound: _Kind(HTTPStatus.NOT_FOUND, _INVALID, "model_not_found", "model"),
    Overloaded: _Kind(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "overloaded"),
    OutOfBlocks: _Kind(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "overloaded"),
    SlowReader: _Kind(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "slow_reader"),
    DeadlineMissed: _Kind(HTTPStatus.GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded"),
    WorkerLost: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "worker_lost"),
    TransferFailed: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "transfer_failed"),
    Unavailable: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "unavailable"),
    DuopoolError: _Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
    Exception: _Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
}
_RETRIABLE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def error_body(error: Exception) -> ErrorBody:
    """The body for an error; one that nobody planned for tells nothing of the inside."""
    kind = _kind(error)
    message = str(error) if isinstance(error, DuopoolError) else "internal error; the router's log has more"
    return _body(message, kind.type, getattr(error, "field", kind.param), kind.code)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """The answer of a call that failed with one of our errors, or with one that nobody planned for."""
    kind = _kind(error)
    headers = {}
    if kind.status in _RETRIABLE:
        # The header takes whole seconds.
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after_s", RETRY_AFTER_S))))
    return JSONResponse(error_body(error), kind.status, headers)


def answer_unauthenticated(error: Unauthenticated) -> JSONResponse:
    """The answer of a call that shows no key, or a wrong one."""
    return JSONResponse(error_body(error), HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})


async def answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    """400 that names the field whose type is wrong, or says where the body stops being JSON."""
    assert isinstance(error, RequestValidationError)
    problems: Sequence[Mapping[str, Any]] = error.errors()
    param = _param(problems[0]["loc"])
    messages = list(dict.fromkeys(_message(problem) for problem in problems if _param(problem["loc"]) == param))
    said = "; or: ".join(messages)
    return JSONResponse(_body(f"{param}: {said}" if param else said, _INVALID, param, None), HTTPStatus.BAD_REQUEST)


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """Unknown paths, wrong methods, bodies that are too large."""
    assert isinstance(error, HTTPException)
    return JSONResponse(_body(str(error.detail), _INVALID, None, None), error.status_code, error.headers)


def _kind(error: Exception) -> _Kind:
    return next(_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS)


def _body(message: str, kind: str, param: str | None, code: str | None) -> ErrorBody:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _param(location: Sequence[str | int]) -> str | None:
    """`messages[0].content` from pydantic's path, which also holds the names of union branches."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
        else:
            break
    return path if path and not path.startswith("[") else None


def _message(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    if problem["type"] in ("model_attributes_type", "dict_type") and len(problem["loc"]) == 1:
        return "the body must be a JSON object, sent as application/json"
    given = problem.get("input")
    shown = json.dumps(given, default=str)[:64] if isinstance(given, str | int | float | bool | None) else ""
    return str(problem["msg"]) + (f", got {shown}" if shown and problem["type"] != "missing" else "")

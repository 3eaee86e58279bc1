"""What every answer of a call has in common: its id, its time, its model, and the errors it may have."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from duopool.router.generation import Generation
from duopool.router.http.errors import ErrorBody
from duopool.router.http.sampling_fields import SamplingFields

MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, as its answers name it."""

    id: str
    created: int
    """Unix time in seconds, as OpenAI has it."""
    model: str
    num_choices: int
    """Per prompt."""
    includes_usage: bool
    """A stream ends with the usage of the whole call."""
    repeats_usage: bool
    """Every chunk says the usage so far."""

    @classmethod
    def of(cls, request: Request, body: SamplingFields, generation: Generation, *, prefix: str) -> Call:
        """Named by the client's `X-Request-Id`, or by chance."""
        name = request.headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or generation.draw_id()
        options = body.stream_options
        return cls(
            id=f"{prefix}-{name}",
            created=int(time.time()),
            model=generation.model_id,
            num_choices=body.num_choices,
            includes_usage=bool(options and options.include_usage),
            repeats_usage=bool(options and options.continuous_usage_stats),
        )

    def header(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def responses(answer: Any, *, is_stream: bool = True) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the answer, and the errors of a call."""
    whole: dict[str, Any] = {"model": answer, "description": "The answer"}
    if is_stream:
        whole["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    told = {
        400: "A field is wrong; `param` names it",
        401: "The API key is missing or unknown",
        404: "The model is not served",
        413: "The body is too large",
        429: "Too much is under way; `Retry-After` says how long to wait",
        500: "A mistake of ours",
        503: "The workers that the call needs are not there",
        504: "The deadline passed",
    }
    return {200: whole, **{status: {"model": ErrorBody, "description": text} for status, text in told.items()}}

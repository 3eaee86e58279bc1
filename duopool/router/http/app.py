"""The HTTP face as an ASGI application: OpenAI's endpoints and vLLM's, over the same `Generation` as gRPC."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from duopool import __version__
from duopool.core.errors import DuopoolError
from duopool.router.generation import Generation
from duopool.router.http import chat, completions, health, live, scrape, tokenise
from duopool.router.http.errors import answer_error, answer_http_error, answer_validation_error
from duopool.router.live import LiveView
from duopool.router.metrics import Metrics


def make_app(generation: Generation, metrics: Metrics, view: LiveView, *, max_body_bytes: int) -> FastAPI:
    """All routes; the document of the interface is at /openapi.json."""
    app = FastAPI(
        title="Duopool",
        version=__version__,
        description="OpenAI-compatible inference from separate prefill and decode pools.",
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            DuopoolError: answer_error,
            RequestValidationError: answer_validation_error,
            HTTPException: answer_http_error,
            Exception: answer_error,
        },
    )
    app.state.max_body_bytes = max_body_bytes
    for part in (completions, chat, tokenise, health):
        app.include_router(part.routes(generation))
    app.include_router(scrape.routes(metrics))
    app.include_router(live.routes(view))
    return app

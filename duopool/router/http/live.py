"""GET / and /live/events: the live page and its stream of events; one static file, nothing to build.

Owns no data: every event is one snapshot of `router/live.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Response
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse

from duopool.router.live import LiveView

PAGE = Path(__file__).resolve().parents[1] / "page" / "live.html"
TICK_S = 0.5
MAX_WATCHERS = 32
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def routes(view: LiveView, *, tick_s: float = TICK_S) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    watchers: set[object] = set()

    @router.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    @router.get("/live/events")
    async def events() -> Response:
        if len(watchers) >= MAX_WATCHERS:
            return PlainTextResponse(f"{MAX_WATCHERS} pages are watching already", 503, {"Retry-After": "5"})
        return StreamingResponse(snapshots(), media_type="text/event-stream", headers=_HEADERS)

    async def snapshots() -> AsyncIterator[str]:
        watcher = object()
        watchers.add(watcher)
        try:
            while True:
                yield f"data: {json.dumps(view.snapshot(), separators=(',', ':'))}\n\n"
                await asyncio.sleep(tick_s)
        finally:
            watchers.discard(watcher)

    return router

"""GET /metrics: what Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Response

from duopool.router.metrics import CONTENT_TYPE, Metrics


def routes(metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["Operation"])

    @router.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """Router, workers and handoff in Prometheus' text format."""
        return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    return router

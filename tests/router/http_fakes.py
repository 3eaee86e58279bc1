"""The HTTP face over the router fakes: httpx speaks to the application itself, without a socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
from router_fakes import FakeCluster

from duopool.router.http.app import make_app
from duopool.router.http.gate import Gate
from duopool.router.public_access import PublicAccess

MAX_BODY_BYTES = 1 << 16


def client_of(cluster: FakeCluster) -> httpx.AsyncClient:
    app = make_app(
        cluster.router.generation, cluster.router.metrics, cluster.router.live, max_body_bytes=MAX_BODY_BYTES
    )
    gate = Gate(app, public=PublicAccess.load(cluster.config), internal=cluster.access)
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://router")


def events_of(body: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end with [DONE]."""
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]

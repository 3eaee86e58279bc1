"""In front of every route: whose call it is. Without a known API key it is answered 401 and its body stays unread."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from duopool.core.errors import Unauthenticated
from duopool.proto.bearer import HEADER
from duopool.proto.internal_access import InternalAccess
from duopool.router.http.errors import answer_unauthenticated
from duopool.router.public_access import PublicAccess

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What load balancers ask, who have no key."""
OPERATOR_PATHS = frozenset({"/", "/live/events", "/metrics"})
"""They tell of all tenants: where keys are asked for, these want the cluster credential."""


class Gate:
    """ASGI middleware; leaves the tenant in `request.state.tenant`."""

    def __init__(self, app: ASGIApp, *, public: PublicAccess, internal: InternalAccess) -> None:
        self._app = app
        self._public = public
        self._internal = internal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._admit(scope, headers)
            except Unauthenticated as error:
                await answer_unauthenticated(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if path in OPEN_PATHS:
            return
        if path in OPERATOR_PATHS and self._public.asks_for_keys:
            if not self._internal.admits(headers):
                raise Unauthenticated(f"{path} needs the cluster credential: 'authorization: Bearer CREDENTIAL'")
            return
        scope.setdefault("state", {})["tenant"] = self._public.tenant(headers.get(HEADER))

"""A gRPC server on an event loop in a thread of its own, so that steps in other threads never hold it up for long.

Owns the loop, the thread and the server's life; what is served is added by the caller, on that loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc

from duopool.core.errors import Unavailable
from duopool.proto.internal_access import InternalAccess

T = TypeVar("T")


class ServerThread:
    """`listen` gives the address, `serve` starts answering; connections made in between wait."""

    def __init__(self, access: InternalAccess) -> None:
        self._access = access
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="duopool-server", daemon=True)
        self._thread.start()

    def listen(self, host: str) -> str:
        """Bind a port that the system chooses; returns host:port. Raises Unavailable."""
        return self.call(self._listen(host))

    def serve(
        self, add_services: Callable[[grpc.aio.Server], None], background: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Register services and start; `background` runs beside them until `stop`."""
        self.call(self._serve(add_services, background))

    def run_beside(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something on the loop beside what is served, until `stop`; how it ends is its own business."""

        async def begin() -> None:
            self._tasks.append(asyncio.create_task(coroutine))

        self.call(begin())

    def stop(self, *, grace_s: float = 0.5) -> None:
        """End all calls and the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        self.call(self._stop(grace_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self, host: str) -> str:
        self._server = self._access.server()
        address = f"[{host}]" if ":" in host else host
        try:
            port = self._access.add_port(self._server, f"{address}:0")
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {host}: {error}") from error
        if port == 0:
            raise Unavailable(f"cannot listen on {host}")
        return f"{address}:{port}"

    async def _serve(
        self, add_services: Callable[[grpc.aio.Server], None], background: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        if self._server is None:
            raise Unavailable("serve() comes after listen()")
        add_services(self._server)
        await self._server.start()
        self._tasks.append(asyncio.create_task(background()))

    async def _stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

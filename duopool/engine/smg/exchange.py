"""The engine service's session with the worker of its own process: commands in, every request's events out.

Owns the ids of requests, the sign of life that the worker waits for, and the leases that are kept while a handle is on
its way through the gateway. Used on the server's event loop only.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duopool.core.errors import Unavailable
from duopool.core.messages import Cancel, Command, Event, Heartbeat
from duopool.core.types import LeaseId, RequestId
from duopool.proto.worker_service import LocalSession

HANDLE_TTL_S = 30.0
"""A gateway may take this long from a prefill's answer to the decode worker's read."""
_NEWEST_ATTEMPT = 1 << 30


class Line:
    """One request's commands and events."""

    def __init__(self, request_id: RequestId, send: Callable[[Sequence[Command]], None]) -> None:
        self.request_id = request_id
        self.send = send
        self.is_over = False
        """Set by the caller when the worker needs no Cancel."""
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def put(self, event: Event | None) -> None:
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """Raises Unavailable when nothing more will come."""
        event = await self._events.get()
        if event is None:
            raise Unavailable("the request was aborted")
        return event


class Exchange:
    """`run` beside the service; `open` a line for each request."""

    def __init__(
        self, session: LocalSession, *, heartbeat_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._session = session
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._lines: dict[RequestId, Line] = {}
        self._aliases: dict[str, set[RequestId]] = {}
        self._held: dict[LeaseId, float] = {}
        """Leases whose handle was given away, and until when they are extended."""
        self._is_over = False

    @property
    def num_requests(self) -> int:
        return len(self._lines)

    async def run(self) -> None:
        """Pass events on and give signs of life, until the session ends."""
        beat = asyncio.create_task(self._beat())
        try:
            while events := await self._session.receive():
                for event in events:
                    line = self._lines.get(getattr(event, "request_id", RequestId("")))
                    if line is not None:
                        line.put(event)
        finally:
            beat.cancel()
            self._is_over = True
            for line in self._lines.values():
                line.put(None)

    @contextmanager
    def open(self, alias: str) -> Iterator[Line]:
        """A new request; the worker is told to forget it unless the line is over by then. Raises Unavailable."""
        if self._is_over:
            raise Unavailable("the worker is ending")
        line = Line(RequestId(secrets.token_hex(16)), self._session.send)
        self._lines[line.request_id] = line
        self._aliases.setdefault(alias, set()).add(line.request_id)
        try:
            yield line
        finally:
            del self._lines[line.request_id]
            self._aliases[alias].discard(line.request_id)
            if not self._aliases[alias]:
                del self._aliases[alias]
            if not line.is_over:
                self._session.send((Cancel(request_id=line.request_id, attempt=_NEWEST_ATTEMPT),))

    def abort(self, alias: str) -> None:
        """End the requests of this name; it is the client's, so there may be several."""
        for request_id in self._aliases.get(alias, ()):
            self._lines[request_id].put(None)

    def hold(self, lease_id: LeaseId) -> None:
        """Keep the lease while its handle is on its way."""
        self._held[lease_id] = self._clock() + HANDLE_TTL_S

    async def _beat(self) -> None:
        while True:
            now = self._clock()
            self._held = {lease_id: until for lease_id, until in self._held.items() if until > now}
            self._session.send((Heartbeat(lease_ids=tuple(self._held)),))
            await asyncio.sleep(self._heartbeat_s)

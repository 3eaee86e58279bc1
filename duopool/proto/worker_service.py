"""The session service: routers' commands in, the worker's events out, over one gRPC stream per router.

Owns the sessions' streams and the heartbeat, which goes out even while a step runs. Everything that touches a stream
happens on the server's event loop; events from other threads come in through `flush`. What the worker says at one
moment leaves as one message per session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import grpc
import msgspec
from msgspec import structs

from duopool.core.messages import Command, Event, KvChanged, KvSnapshot, LedgerReport, StepReport, WorkerLoad
from duopool.core.types import Incarnation
from duopool.core.worker import SessionId, Worker
from duopool.proto import codec
from duopool.proto.process_resources import measure_resources

log = logging.getLogger(__name__)

INCARNATION_KEY = "incarnation"
"""Call metadata: which life of the worker the router means, in decimal."""
MAX_UNSENT_EVENTS = 200_000
"""A router that leaves more unread than this is cut off."""


class _Mailbox:
    """Events on their way to one router. Only the newest load is kept: older ones say nothing more."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._load: WorkerLoad | None = None
        self._has_snapshot = False
        self._filled = asyncio.Event()
        self.is_closed = False

    def put(self, event: Event) -> None:
        if isinstance(event, WorkerLoad):
            self._load = event
        elif isinstance(event, KvChanged) and not self._has_snapshot:
            return  # the snapshot that comes first holds it already
        else:
            self._has_snapshot = self._has_snapshot or isinstance(event, KvSnapshot)
            self._events.append(event)
        if len(self._events) > MAX_UNSENT_EVENTS:
            self.is_closed = True
        self._filled.set()

    def close(self) -> None:
        self.is_closed = True
        self._filled.set()

    async def take(self) -> tuple[Event, ...]:
        """Everything that is there, at least one event; empty once closed."""
        await self._filled.wait()
        self._filled.clear()
        if self.is_closed:
            return ()
        events, self._events = self._events, []
        if self._load is not None:
            events.append(self._load)
            self._load = None
        return tuple(events)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSession:
    """A session without a stream, for a service in the worker's own process. Used on the server's event loop only."""

    send: Callable[[Sequence[Command]], None]
    receive: Callable[[], Awaitable[tuple[Event, ...]]]
    """Everything that is there, at least one event; empty once the session is over."""


class WorkerService:
    """Serves one worker on one event loop."""

    def __init__(
        self,
        worker: Worker,
        *,
        incarnation: Incarnation,
        heartbeat_s: float,
        on_commands: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_commands` is called when the worker has taken commands in: its step loop may have work."""
        self._worker = worker
        self._incarnation = incarnation
        self._heartbeat_s = heartbeat_s
        self._on_commands = on_commands
        self._clock = clock
        self._mailboxes: dict[SessionId, _Mailbox] = {}
        self._session_ids = count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_flush_due = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register on a server of the running event loop, before it is started."""
        self._loop = asyncio.get_running_loop()
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        methods = {codec.SESSION_METHOD.rpartition("/")[2]: handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(codec.WORKER_SERVICE, methods),))

    def flush(self) -> None:
        """Send what the worker has to say. Any thread; returns at once."""
        if self._is_flush_due or self._loop is None:
            return
        self._is_flush_due = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    async def beat(self) -> None:
        """Tell every router how busy the worker is, until cancelled."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            load = self._worker.load()
            for mailbox in self._mailboxes.values():
                mailbox.put(load)

    def close(self) -> None:
        """End all sessions; on the event loop."""
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def _deliver(self) -> None:
        self._is_flush_due = False
        for addressed in self._worker.take_events():
            if addressed.session is None:
                for mailbox in self._mailboxes.values():
                    mailbox.put(addressed.event)
            elif (found := self._mailboxes.get(addressed.session)) is not None:
                found.put(self._completed(addressed.event))

    def _completed(self, event: Event) -> Event:
        """A ledger lacks what only the process knows."""
        if not isinstance(event, LedgerReport):
            return event
        resources = measure_resources(num_streams=len(self._mailboxes))
        return structs.replace(event, ledger=structs.replace(event.ledger, resources=resources))

    async def _session(self, requests: AsyncIterator[bytes], context: Any) -> None:
        # A coroutine that writes, not an async generator: its `finally` runs at once when the router goes away.
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get(INCARNATION_KEY) != str(self._incarnation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this is another incarnation of the worker")
        with self._opened() as (session, mailbox):
            commands = asyncio.create_task(self._take_commands(requests, session))
            commands.add_done_callback(lambda _: mailbox.close())
            try:
                while events := await mailbox.take():
                    await context.write(codec.encode(StepReport(events=events)))
                if commands.done() and not commands.cancelled() and (error := commands.exception()) is not None:
                    if isinstance(error, msgspec.DecodeError):
                        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                    log.error("a command failed in a way that nobody planned for", exc_info=error)
                    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the worker's log has more")
            finally:
                commands.cancel()

    @contextmanager
    def local_session(self) -> Iterator[LocalSession]:
        """A session that lasts as long as the `with` block; on the event loop."""
        with self._opened() as (session, mailbox):
            yield LocalSession(send=partial(self._take_batch, session=session), receive=mailbox.take)

    @contextmanager
    def _opened(self) -> Iterator[tuple[SessionId, _Mailbox]]:
        session, mailbox = SessionId(next(self._session_ids)), _Mailbox()
        self._mailboxes[session] = mailbox
        self._worker.open_session(session, now=self._clock())
        self._deliver()
        try:
            yield session, mailbox
        finally:
            del self._mailboxes[session]
            self._worker.close_session(session, now=self._clock())

    async def _take_commands(self, requests: AsyncIterator[bytes], session: SessionId) -> None:
        async for data in requests:
            try:
                batch = codec.decode_commands(data)
            except msgspec.DecodeError as error:
                log.warning("session %d sent what is not a command batch: %s", session, error)
                raise
            self._take_batch(batch.commands, session)

    def _take_batch(self, commands: Sequence[Command], session: SessionId) -> None:
        for command in commands:
            self._worker.handle(command, session, now=self._clock())
        self._deliver()
        self._on_commands()

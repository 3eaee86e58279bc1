"""One router's connection to one worker: commands out in batches, step reports in, and the signs of life.

Owns the stream, its reconnects and the two watchdogs. A session is ready from the worker's first message until the
stream breaks, falls silent or the worker stops making progress; whoever listens is told both. It knows no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from enum import StrEnum
from itertools import count
from typing import Protocol

from duopool.core.config import HandoffConfig
from duopool.core.handoff.request import Member
from duopool.core.messages import Command, CommandBatch, Event, Heartbeat, StepReport, WorkerInfo, WorkerLoad
from duopool.router.connection import Connect, Connection, ConnectionBroken

log = logging.getLogger(__name__)

LOOKS_PER_HEARTBEAT = 5
"""How often the watchdogs look between two heartbeats."""
STALL_FACTOR = 5.0
"""A worker may take this many watchdog times for one step."""
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0


class SessionState(StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"


class SessionListener(Protocol):
    """Whom a session reports to. Called on the event loop; must not wait."""

    def session_ready(self, member: Member) -> None: ...

    def session_lost(self, member: Member, reason: str) -> None: ...

    def session_heard(self, member: Member, event: Event) -> None: ...

    def heartbeat(self, member: Member) -> Heartbeat:
        """What the router still wants of this worker."""
        ...


class Session:
    """`run` keeps the session up until it is cancelled."""

    def __init__(
        self,
        info: WorkerInfo,
        listener: SessionListener,
        config: HandoffConfig,
        *,
        connect: Connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.member = Member(info.worker_id, info.incarnation)
        self.state = SessionState.CONNECTING
        self._address = info.address
        self._listener = listener
        self._config = config
        self._connect = connect
        self._clock = clock
        self._outgoing: list[Command] = []
        self._wake = asyncio.Event()
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._num_ticks = -1

    @property
    def is_ready(self) -> bool:
        return self.state is SessionState.READY

    def send(self, command: Command) -> None:
        """Queue a command; dropped while the session is down, as the worker drops all requests of a lost session."""
        if self.is_ready:
            self._outgoing.append(command)
            self._wake.set()

    async def run(self) -> None:
        """Connect, talk, and connect again when the stream ends."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._converse()
            except* Exception as errors:
                error = errors.exceptions[0]
                reason = _reason(error)
                if not isinstance(error, ConnectionBroken):
                    log.error("session with %s failed", self.member.worker_id, exc_info=error)
                elif self.is_ready:
                    log.warning("worker %s is lost: %s", self.member.worker_id, reason)
                    backoff_s = FIRST_BACKOFF_S
                self._lose(reason)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def close(self, reason: str) -> None:
        """Tell the listener that the session is over for good; `run` is cancelled by its owner."""
        self._lose(reason)

    async def _converse(self) -> None:
        async with self._connect(self._address, self.member.incarnation) as connection:
            self._heard_at = self._progress_at = self._clock()
            self._outgoing.clear()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(connection))
                tasks.create_task(self._write(connection))
                tasks.create_task(self._beat())

    async def _read(self, connection: Connection) -> None:
        while True:
            report = await connection.read()
            self._heard_at = self._clock()
            self._take(report)

    def _take(self, report: StepReport) -> None:
        if not self.is_ready:
            self.state = SessionState.READY
            self._listener.session_ready(self.member)
        for event in report.events:
            if isinstance(event, WorkerLoad) and event.num_ticks != self._num_ticks:
                self._num_ticks = event.num_ticks
                self._progress_at = self._heard_at
            self._listener.session_heard(self.member, event)

    async def _write(self, connection: Connection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._outgoing = self._outgoing, []
            if commands:
                await connection.write(CommandBatch(commands=tuple(commands)))

    async def _beat(self) -> None:
        """Heartbeats out, watchdogs in. Time in which this process itself was held up counts for nobody."""
        look_s = self._config.heartbeat_s / LOOKS_PER_HEARTBEAT
        for look in count(1):
            before = self._clock()
            await asyncio.sleep(look_s)
            now = self._clock()
            held_up_s = now - before - look_s
            if held_up_s > self._config.heartbeat_s:
                self._heard_at += held_up_s
                self._progress_at += held_up_s
            if now - self._heard_at > self._config.progress_watchdog_s:
                raise ConnectionBroken(f"silent for {now - self._heard_at:.1f} s")
            if look % LOOKS_PER_HEARTBEAT:
                continue
            if now - self._progress_at > STALL_FACTOR * self._config.progress_watchdog_s:
                raise ConnectionBroken(f"its step has not ended for {now - self._progress_at:.1f} s")
            self.send(self._listener.heartbeat(self.member))

    def _lose(self, reason: str) -> None:
        if self.state is not SessionState.LOST:
            self.state = SessionState.LOST
            self._outgoing.clear()
            self._listener.session_lost(self.member, reason)


def _reason(error: BaseException) -> str:
    with contextlib.suppress(AttributeError):
        return _reason(error.exceptions[0])  # type: ignore[attr-defined]
    return str(error) or type(error).__name__

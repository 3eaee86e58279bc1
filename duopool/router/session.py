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
from typing import Any, Protocol

import grpc
import msgspec

from duopool.core.config import HandoffConfig
from duopool.core.handoff.request import Member
from duopool.core.messages import Command, CommandBatch, Event, Heartbeat, StepReport, WorkerInfo, WorkerLoad
from duopool.core.types import LeaseId
from duopool.proto import codec

log = logging.getLogger(__name__)

INCARNATION_KEY = "incarnation"
"""Call metadata: the worker refuses a session that is meant for another life of it."""
STALL_FACTOR = 5.0
"""A worker with running requests may take this many watchdog times for one step."""
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

    def lease_ids(self, member: Member) -> tuple[LeaseId, ...]:
        """Leases of this worker that the router still wants."""
        ...

    def expects_progress(self, member: Member) -> bool:
        """Whether a request of this router needs steps there now."""
        ...


class _Broken(Exception):
    """The stream cannot go on."""


_EXPECTED = (grpc.RpcError, _Broken, msgspec.ValidationError, msgspec.DecodeError)
"""What a worker or the network does; anything else is a mistake of ours."""


class Session:
    """`run` keeps the session up until it is cancelled."""

    def __init__(
        self,
        info: WorkerInfo,
        listener: SessionListener,
        config: HandoffConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.member = Member(info.worker_id, info.incarnation)
        self.state = SessionState.CONNECTING
        self._address = info.address
        self._listener = listener
        self._config = config
        self._clock = clock
        self._outgoing: list[Command] = []
        self._wake = asyncio.Event()
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._num_steps = -1

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
                if not isinstance(error, _EXPECTED):
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
        async with grpc.aio.insecure_channel(self._address, options=codec.INTERNAL_CHANNEL_OPTIONS) as channel:
            method = channel.stream_stream(
                codec.SESSION_METHOD, request_serializer=codec.encode, response_deserializer=codec.decode_report
            )
            call = method(metadata=((INCARNATION_KEY, str(self.member.incarnation)),))
            self._heard_at = self._progress_at = self._clock()
            self._outgoing.clear()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._read(call))
                    tasks.create_task(self._write(call))
                    tasks.create_task(self._beat())
            finally:
                call.cancel()

    async def _read(self, call: Any) -> None:
        while True:
            report = await call.read()
            if report is grpc.aio.EOF:
                raise _Broken(f"the worker ended the session: {await call.details() or await call.code()}")
            self._heard_at = self._clock()
            self._take(report)

    def _take(self, report: StepReport) -> None:
        if not self.is_ready:
            self.state = SessionState.READY
            self._listener.session_ready(self.member)
        for event in report.events:
            if isinstance(event, WorkerLoad) and event.num_steps != self._num_steps:
                self._num_steps = event.num_steps
                self._progress_at = self._heard_at
            self._listener.session_heard(self.member, event)

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._outgoing = self._outgoing, []
            if commands:
                await call.write(CommandBatch(commands=tuple(commands)))

    async def _beat(self) -> None:
        """Heartbeats out, watchdogs in. Time in which this process itself was held up counts for nobody."""
        while True:
            before = self._clock()
            await asyncio.sleep(self._config.heartbeat_s)
            now = self._clock()
            if not self._listener.expects_progress(self.member):
                self._progress_at = now
            held_up_s = now - before - self._config.heartbeat_s
            if held_up_s > self._config.heartbeat_s:
                self._heard_at += held_up_s
                self._progress_at += held_up_s
            if now - self._heard_at > self._config.progress_watchdog_s:
                raise _Broken(f"silent for {now - self._heard_at:.1f} s")
            if now - self._progress_at > STALL_FACTOR * self._config.progress_watchdog_s:
                raise _Broken(f"no step for {now - self._progress_at:.1f} s while requests run")
            self.send(Heartbeat(lease_ids=self._listener.lease_ids(self.member)))

    def _lose(self, reason: str) -> None:
        if self.state is not SessionState.LOST:
            self.state = SessionState.LOST
            self._outgoing.clear()
            self._listener.session_lost(self.member, reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    with contextlib.suppress(AttributeError):
        return _reason(error.exceptions[0])  # type: ignore[attr-defined]
    return str(error) or type(error).__name__

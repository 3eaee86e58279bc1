"""The two pools as the router sees them: who is a member, who can be reached, what they hold, how busy they are.

Owns the sessions, the prefix index, the load table and the register of live requests, and hands each worker's message
to its request. Routes are the policy's; what becomes of a request is its life's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from duopool.core.audit import RequestEntry, RouterView
from duopool.core.config import RouterConfig
from duopool.core.errors import DuopoolError
from duopool.core.handoff.request import Member, Phase, Route, WorkerMessage
from duopool.core.messages import (
    AttemptRef,
    Cancel,
    Command,
    Event,
    Heartbeat,
    KvChanged,
    KvSnapshot,
    LedgerReport,
    Nack,
    SnapshotWanted,
    Tokens,
    WorkerInfo,
    WorkerLoad,
)
from duopool.core.types import BlockKey, LeaseId, RequestId, Role
from duopool.router.connection import Connect
from duopool.router.load_table import LoadTable
from duopool.router.policy import Candidate, Decision, choose, choose_decode
from duopool.router.prefix_index import PrefixIndex, PrefixRun
from duopool.router.retry_budget import RetryBudget
from duopool.router.session import Session, SessionState
from duopool.router.watch import RequestRecord

log = logging.getLogger(__name__)

RequestMessage = WorkerMessage


class Life(Protocol):
    """A live request, as the pools know it. No call may wait."""

    @property
    def request_id(self) -> RequestId: ...

    @property
    def priority(self) -> int:
        """Lower values are routed first."""
        ...

    @property
    def is_carrier(self) -> bool:
        """Whether it brings the prompt of other requests to a decode worker, and has no output of its own."""
        ...

    def hear(self, member: Member, message: RequestMessage) -> None: ...

    def lose(self, member: Member) -> None: ...

    def find_again(self, member: Member) -> None:
        """A session to that worker begins, maybe not the first one."""
        ...

    def bury(self, member: Member) -> None:
        """That worker's process is no member any more."""
        ...

    def stop(self, phase: Phase, error: DuopoolError | None = None) -> None: ...

    def try_route(self) -> None:
        """Somebody came back or joined: look for a route again, if one is wanted."""
        ...

    def decodes_on(self, member: Member) -> bool:
        """Whether that worker's batch holds the request."""
        ...

    @property
    def is_moving(self) -> bool:
        """Whether it is just going over from one decode worker to another."""
        ...

    num_failed_moves: int
    """How often that ended with a fault; a target that was busy is none."""

    def move(self) -> None:
        """Go over to another decode worker without a pause, if one can take it."""
        ...

    def evict(self, member: Member) -> None:
        """Leave that worker now and go on elsewhere from the tokens."""
        ...

    def entry(self) -> RequestEntry:
        """Where the request stands, for an audit."""
        ...

    def record(self) -> RequestRecord:
        """Its story so far."""
        ...

    def attempt_on(self, member: Member) -> int | None:
        """The attempt that the worker must have, if there is one."""
        ...

    def lease_on(self, member: Member) -> LeaseId | None:
        """The lease of that worker that the request still needs."""
        ...


@dataclass(slots=True)
class _Seat:
    info: WorkerInfo
    session: Session
    task: asyncio.Task[None]


class Pools:
    """Mutable state of one router, all on one event loop."""

    def __init__(self, config: RouterConfig, *, connect: Connect, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._connect = connect
        self._clock = clock
        self._seats: dict[Member, _Seat] = {}
        self._index = PrefixIndex()
        self._lives: dict[RequestId, Life] = {}
        self._rotation = 0
        self.loads = LoadTable()
        self.retries = RetryBudget(config.handoff)
        self.wanted: dict[str, int] = {}
        """Pool sizes that the supervisor aims at."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a session comes or goes."""
        self.on_ledger: Callable[[Member, LedgerReport], None] = lambda member, report: None
        """Called with a worker's answer to an audit."""

    # ---- membership -------------------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[WorkerInfo, ...]:
        return tuple(seat.info for seat in self._seats.values())

    @property
    def lives(self) -> tuple[Life, ...]:
        """Requests that have not ended."""
        return tuple(self._lives.values())

    @property
    def num_requests(self) -> int:
        """Choices that are alive."""
        return sum(not life.is_carrier for life in self._lives.values())

    def update(self, infos: Sequence[WorkerInfo]) -> None:
        """Take in the whole membership: sessions to new members begin, those of members that are gone end."""
        current = {self.member_of(info): info for info in infos}
        for member in [member for member in self._seats if member not in current]:
            self._leave(member, "it left the membership")
            for life in list(self._lives.values()):
                life.bury(member)
        for member, info in current.items():
            if member in self._seats:
                self._seats[member].info = info
            else:
                session = Session(info, self, self._config.handoff, connect=self._connect, clock=self._clock)
                task = asyncio.create_task(session.run(), name=f"session {info.worker_id}")
                self._seats[member] = _Seat(info, session, task)
        self._changed()

    async def close(self) -> None:
        """End all sessions."""
        tasks = [seat.task for seat in self._seats.values()]
        for member in list(self._seats):
            self._leave(member, "the router stops")
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def num_ready(self, role: str) -> int:
        """Workers of a role that take new requests."""
        return len(self._ready(role))

    def draining(self, role: str) -> list[WorkerInfo]:
        """Workers of a role that are to be empty soon and can be reached."""
        seats = self._seats.values()
        return [one.info for one in seats if one.info.role == role and one.info.draining and one.session.is_ready]

    @staticmethod
    def member_of(info: WorkerInfo) -> Member:
        return Member(info.worker_id, info.incarnation)

    def state_of(self, info: WorkerInfo) -> str:
        """Connecting, ready, draining or lost."""
        seat = self._seats[self.member_of(info)]
        if seat.session.state is SessionState.READY and seat.info.draining:
            return "draining"
        return seat.session.state.value

    def worker_states(self) -> list[tuple[WorkerInfo, str, WorkerLoad]]:
        """Every member by role and name, with its state (see `state_of`) and its last load."""
        members = sorted(self.members, key=lambda info: (info.role, info.worker_id))
        return [(info, self.state_of(info), self.loads.load(self.member_of(info))) for info in members]

    def _leave(self, member: Member, reason: str) -> None:
        seat = self._seats.pop(member)
        seat.task.cancel()
        seat.session.close(reason)

    def _ready(self, role: str) -> list[Member]:
        return [
            member
            for member, seat in self._seats.items()
            if seat.info.role == role and seat.session.is_ready and not seat.info.draining
        ]

    def _changed(self) -> None:
        self.on_change()
        for life in sorted(self._lives.values(), key=lambda life: life.priority):
            life.try_route()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def enter(self, life: Life) -> None:
        """From now on the request hears what workers say of it."""
        self._lives[life.request_id] = life
        self.retries.earn()

    def leave(self, request_id: RequestId) -> None:
        self._lives.pop(request_id, None)

    def send(self, member: Member, command: Command) -> None:
        """Queue a command; dropped when the worker cannot be reached."""
        seat = self._seats.get(member)
        if seat is not None:
            seat.session.send(command)

    def view(self) -> RouterView:
        """All live requests at this moment."""
        return {request_id: life.entry() for request_id, life in self._lives.items()}

    def namespace(self) -> tuple[int, bytes]:
        """(block size, namespace) of the members' block keys."""
        for seat in self._seats.values():
            return seat.info.block_size, seat.info.model_digest.encode()
        return self._config.block_size, b""

    def route(
        self, num_tokens: int, keys: Sequence[BlockKey], *, excluded: Collection[Member], refused: Collection[Member]
    ) -> Decision | None:
        """Where a prefix with these block keys should go now; excluded workers only if there are no others."""
        hits = self._index.num_hits(keys)
        block_size = self.namespace()[0]
        self._rotation += 1
        decision = choose(
            [
                self._candidate(member, max(hits.get(member, 0), self.loads.num_expected(member, keys)) * block_size)
                for member in self._eligible(Role.PREFILL, excluded, refused)
            ],
            [
                self._candidate(member, hits.get(member, 0) * block_size)
                for member in self._eligible(Role.DECODE, excluded, refused)
            ],
            num_tokens=num_tokens,
            block_size=block_size,
            local_prefill_max_tokens=self._config.handoff.local_prefill_max_tokens,
            rotation=self._rotation,
        )
        if decision is not None:
            route = decision.route
            self._index.used(keys, max(hits.get(route.decode, 0), hits.get(route.prefill, 0) if route.prefill else 0))
        return decision

    def prefix_runs(self) -> list[PrefixRun]:
        """The prefixes that workers hold, as a tree."""
        return self._index.runs()

    def route_decode(
        self,
        prefill: Member,
        num_tokens: int,
        keys: Sequence[BlockKey],
        *,
        excluded: Collection[Member],
        refused: Collection[Member],
    ) -> Route | None:
        """Another decode worker for what `prefill` has leased."""
        hits = self._index.num_hits(keys)
        block_size = self.namespace()[0]
        self._rotation += 1
        decode = choose_decode(
            [
                self._candidate(member, hits.get(member, 0) * block_size)
                for member in self._eligible(Role.DECODE, excluded, refused)
            ],
            num_tokens=num_tokens,
            block_size=block_size,
            rotation=self._rotation,
        )
        return None if decode is None else Route(prefill=prefill, decode=decode)

    def _eligible(self, role: Role, excluded: Collection[Member], refused: Collection[Member]) -> list[Member]:
        ready = [member for member in self._ready(role) if member not in refused]
        return [member for member in ready if member not in excluded] or ready

    def _candidate(self, member: Member, num_hit_tokens: int) -> Candidate:
        num_unseen_tokens, num_unseen_sequences = self.loads.unseen(member)
        return Candidate(
            member=member,
            num_hit_tokens=num_hit_tokens,
            load=self.loads.load(member),
            num_unseen_tokens=num_unseen_tokens,
            num_unseen_sequences=num_unseen_sequences,
        )

    # ---- what sessions report (SessionListener) ---------------------------------------------------------------------

    def session_ready(self, member: Member) -> None:
        self._index.add(member)
        for life in list(self._lives.values()):
            life.find_again(member)
        self._changed()

    def session_lost(self, member: Member, reason: str) -> None:
        self._index.drop(member)
        self.loads.forget(member)
        for life in list(self._lives.values()):
            life.lose(member)
        self.on_change()

    def session_heard(self, member: Member, event: Event) -> None:
        match event:
            case WorkerLoad():
                self.loads.report(member, event)
            case LedgerReport():
                self.on_ledger(member, event)
            case KvChanged() | KvSnapshot():
                if self._index.apply(member, event):
                    self.send(member, SnapshotWanted())
            case _:
                self._request_heard(member, event)

    def heartbeat(self, member: Member) -> Heartbeat:
        leases = (life.lease_on(member) for life in self._lives.values())
        attempts = ((life.request_id, life.attempt_on(member)) for life in self._lives.values())
        return Heartbeat(
            lease_ids=tuple(lease_id for lease_id in leases if lease_id is not None),
            attempts=tuple(AttemptRef(request_id, attempt) for request_id, attempt in attempts if attempt is not None),
        )

    def _request_heard(self, member: Member, message: RequestMessage) -> None:
        life = self._lives.get(message.request_id)
        if life is not None:
            self.loads.heard(member, message.request_id)
            try:
                life.hear(member, message)
            except Exception:
                # A mistake of ours must cost one request, not all that share the session.
                log.exception("request %s failed", life.request_id)
                life.stop(Phase.FAILED, DuopoolError("internal error; the router's log has more"))
        elif not isinstance(message, Nack) and not (isinstance(message, Tokens) and message.finish_reason):
            # A sign of life of a request that has ended here: the first Cancel may have been lost.
            self.send(member, Cancel(request_id=message.request_id, attempt=message.attempt))

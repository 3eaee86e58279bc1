"""Keeps both pools at their wanted size: starts, watches, replaces, drains and stops workers.

Owns the places of the pools and decides by `pools.plan` in every tick. It does no I/O of its own: processes come from
`spawn`, the membership leaves through `publish`, time enters as an argument. All methods belong to one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from duopool.cluster import pools
from duopool.cluster.config import SupervisorConfig
from duopool.cluster.membership import ClusterView, WorkerMismatch, check_same
from duopool.cluster.pools import Drain, PlaceState, Start, Stop
from duopool.cluster.worker_process import ProcessGone, WorkerProcess
from duopool.core.config import MAX_POOL_SIZE
from duopool.core.errors import InvalidRequest, WorkerNotFound
from duopool.core.messages import WorkerInfo
from duopool.core.types import Role, WorkerId

logger = logging.getLogger(__name__)

IDLE_ANSWERS_BEFORE_STOP = 2
"""A router may have sent a request before it learnt that the worker drains; one idle answer is not enough."""


@dataclass(slots=True, kw_only=True)
class _Place:
    """One place and the process in it."""

    worker_id: WorkerId
    role: Role
    state: PlaceState = PlaceState.WAITING
    process: WorkerProcess | None = None
    """Of a waiting place: the host that will start the next worker, if one is left."""
    info: WorkerInfo | None = None
    since: float = 0.0
    """When the state began."""
    retry_at: float = 0.0
    failures: int = 0
    """Ends in a row without a stable time between them."""
    last_ping: float = 0.0
    last_answer: float = 0.0
    idle_answers: int = 0
    is_outdated: bool = False
    """A rolling restart is to renew it."""


@dataclass(slots=True, kw_only=True)
class Supervisor:
    """See the module. `spawn` creates a process and returns at once; `publish` gets the view whenever it changes."""

    config: SupervisorConfig
    spawn: Callable[[WorkerId, Role], WorkerProcess]
    publish: Callable[[ClusterView], None]
    wanted: dict[Role, int]
    last_error: str = ""
    """Why the latest worker ended."""
    num_failures: int = 0
    """Workers that ended without being asked to, ever."""
    _drain_first: bool = False
    """How outdated places are renewed; see `pools.plan`."""
    _places: dict[WorkerId, _Place] = field(default_factory=dict)
    _published: ClusterView | None = None

    def tick(self, now: float) -> None:
        """Look at every process, act on the plan, publish what changed."""
        for place in list(self._places.values()):
            self._observe(place, now)
        seen = [self._seen(place, now) for place in self._places.values()]
        for action in pools.plan(self.wanted, seen, now=now, drain_first=self._drain_first):
            self._act(action, now)
        self._publish_changes()

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Set the size of each named pool. Raises InvalidRequest; then nothing changed."""
        wanted = dict(self.wanted)
        for name, size in sizes.items():
            if name not in set(Role):
                raise InvalidRequest("pools", f"there is no pool {name!r}; pools are {', '.join(Role)}")
            if not 1 <= size <= MAX_POOL_SIZE:
                raise InvalidRequest(f"pools[{name}]", f"must be between 1 and {MAX_POOL_SIZE}, got {size}")
            wanted[Role(name)] = size
        self.wanted = wanted

    def drain(self, worker_id: str, incarnation: int, now: float) -> None:
        """Let a worker finish and stop it; its pool gets another one.

        Raises WorkerNotFound, also for a successor of the one that was meant.
        """
        place = self._places.get(WorkerId(worker_id))
        if place is None or place.info is None:
            raise WorkerNotFound(f"there is no worker {worker_id!r}")
        if place.info.incarnation != incarnation:
            raise WorkerNotFound(f"worker {worker_id!r} has been replaced since")
        if place.state is PlaceState.READY:
            self._drain(place, now)

    def restart(self, *, drain_first: bool = False) -> None:
        """Renew every worker that serves now, one after the other, while the others go on."""
        self._drain_first = drain_first
        for place in self._places.values():
            place.is_outdated = place.state is PlaceState.READY

    def num_ready(self, role: Role) -> int:
        """Workers of a pool that serve."""
        return sum(place.role is role and place.state is PlaceState.READY for place in self._places.values())

    @property
    def is_complete(self) -> bool:
        """True if every pool has all its workers ready."""
        return all(self.num_ready(role) >= size for role, size in self.wanted.items())

    @property
    def view(self) -> ClusterView:
        """The membership now."""
        members = tuple(
            msgspec.structs.replace(place.info, draining=True, drain_s=self.config.drain_timeout_s)
            if place.state is PlaceState.DRAINING
            else place.info
            for place in self._places.values()
            if place.info is not None
        )
        return ClusterView(members=members, wanted=dict(self.wanted))

    def check(self, *, timeout_s: float) -> None:
        """Have every worker prove its invariants; raises AssertionError. May be called from any thread."""
        for place in list(self._places.values()):
            if place.process is not None and place.info is not None:
                place.process.check(timeout_s=timeout_s)

    def stop_all(self) -> None:
        """End every worker at once."""
        for place in self._places.values():
            if place.process is not None:
                place.process.kill()
        self._places.clear()
        self._publish_changes()

    def _observe(self, place: _Place, now: float) -> None:
        if place.process is None or place.state is PlaceState.WAITING:
            return
        try:
            if place.state is PlaceState.STARTING:
                self._observe_start(place, place.process, now)
            else:
                self._observe_life(place, place.process, now)
        except (ProcessGone, WorkerMismatch) as error:
            self._lose(place, str(error), now)

    def _observe_start(self, place: _Place, process: WorkerProcess, now: float) -> None:
        info = process.poll_start()
        if info is None:
            if now - place.since > self.config.start_timeout_s:
                raise ProcessGone(f"not ready within {self.config.start_timeout_s:.0f} s")
            return
        for other in self._places.values():
            if other.info is not None:
                check_same(other.info, info)
        place.info, place.state, place.since = info, PlaceState.READY, now
        place.last_answer = place.last_ping = now
        logger.info("%s is ready at %s", place.worker_id, info.address)

    def _observe_life(self, place: _Place, process: WorkerProcess, now: float) -> None:
        is_idle = process.poll_ping()
        if is_idle is not None:
            place.last_answer = now
            place.idle_answers = place.idle_answers + 1 if is_idle else 0
        elif now - place.last_answer > self.config.ping_timeout_s:
            raise ProcessGone(f"no answer for {self.config.ping_timeout_s:.0f} s")
        if now - place.last_ping >= self.config.ping_s:
            place.last_ping = now
            process.ping()

    def _lose(self, place: _Place, why: str, now: float) -> None:
        """The process is gone or will be: the router learns it at once, a new one follows after a pause."""
        logger.warning("%s ended: %s", place.worker_id, why)
        was_stable = place.state is PlaceState.READY and now - place.since >= self.config.stable_s
        failures = 1 if was_stable else place.failures + 1
        self.last_error = f"{place.worker_id}: {why}"
        self.num_failures += 1
        host = place.process if place.process is not None and place.process.has_host else None
        if place.process is not None and (host is None or place.state is PlaceState.DRAINING):
            place.process.kill()
        if place.state is PlaceState.DRAINING:
            del self._places[place.worker_id]
            return
        pause = min(self.config.max_backoff_s, self.config.backoff_s * 2.0 ** min(failures - 1, 30))
        self._places[place.worker_id] = _Place(
            worker_id=place.worker_id,
            role=place.role,
            process=host,
            since=now,
            failures=failures,
            retry_at=now + pause,
        )

    def _seen(self, place: _Place, now: float) -> pools.Place:
        is_over = now - place.since > self.config.drain_timeout_s
        return pools.Place(
            worker_id=place.worker_id,
            role=place.role,
            state=place.state,
            retry_at=place.retry_at,
            is_idle=place.idle_answers >= IDLE_ANSWERS_BEFORE_STOP or is_over,
            is_outdated=place.is_outdated and place.state is PlaceState.READY,
        )

    def _act(self, action: pools.Action, now: float) -> None:
        match action:
            case Start(worker_id, role):
                place = self._places.setdefault(worker_id, _Place(worker_id=worker_id, role=role))
                place.state, place.since = PlaceState.STARTING, now
                if place.process is None:
                    place.process = self.spawn(worker_id, role)
                else:
                    place.process.start_again()
            case Drain(worker_id):
                self._drain(self._places[worker_id], now)
            case Stop(worker_id):
                place = self._places.pop(worker_id)
                # Routers must have dropped the worker before its connections break.
                self._publish_changes()
                if place.process is not None:
                    place.process.kill()
                logger.info("%s stopped", worker_id)

    def _drain(self, place: _Place, now: float) -> None:
        place.state, place.since, place.idle_answers = PlaceState.DRAINING, now, 0
        self._publish_changes()
        if place.process is not None:
            try:
                place.process.drain()
            except ProcessGone as error:
                self._lose(place, str(error), now)
        logger.info("%s drains", place.worker_id)

    def _publish_changes(self) -> None:
        view = self.view
        if view != self._published:
            self._published = view
            self.publish(view)

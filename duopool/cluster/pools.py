"""Plans pool sizes: what is wanted and what is there gives what to start, drain and stop. Pure, no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from duopool.core.types import Role, WorkerId


class PlaceState(StrEnum):
    """Where a place in a pool stands."""

    WAITING = "waiting"
    """Its process ended by itself; a new one follows at `retry_at`."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it holds; counts for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One worker's place in its pool, as the planner sees it."""

    worker_id: WorkerId
    role: Role
    state: PlaceState
    retry_at: float = 0.0
    is_idle: bool = False
    """Of a draining place: nothing is left, or its time is up."""
    is_outdated: bool = False
    """Serves, and is to be renewed by a rolling restart."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process in this place."""

    worker_id: WorkerId
    role: Role


@dataclass(frozen=True, slots=True)
class Drain:
    """Let this worker take nothing new."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Stop:
    """End this worker and give its place up."""

    worker_id: WorkerId


Action = Start | Drain | Stop


def plan(wanted: Mapping[Role, int], places: Iterable[Place], *, now: float, drain_first: bool = False) -> list[Action]:
    """Actions that bring every pool to its wanted size, and renew outdated places one after the other.

    A pool that is too small gets new places at the lowest free index. One that is too large loses, in this order,
    places that wait, places that start and ready ones, outdated before others, each from the highest index; ready ones
    are drained first. An outdated place goes when an additional one is ready, so a pool always has its wanted size;
    with `drain_first` it goes before, for clusters without room, and one worker is missing meanwhile.
    """
    places = list(places)
    actions: list[Action] = []
    renewed = next((place.role for place in places if place.is_outdated), None)
    is_draining = any(place.state is PlaceState.DRAINING for place in places)
    for role, size in wanted.items():
        pool = [place for place in places if place.role is role]
        staying = [place for place in pool if place.state is not PlaceState.DRAINING]
        is_renewing = role is renewed and not is_draining
        if is_renewing and not drain_first:
            size += 1
        is_ready = all(place.state is PlaceState.READY for place in staying)
        num_leaving = max(0, len(staying) - size)
        if is_renewing and is_ready and len(staying) == size:
            num_leaving = 1
            size -= 1
        leaving = sorted(staying, key=_first_to_go)[:num_leaving]
        for place in leaving:
            is_serving = place.state is PlaceState.READY
            actions.append(Drain(place.worker_id) if is_serving else Stop(place.worker_id))
        actions += [Stop(place.worker_id) for place in pool if place.state is PlaceState.DRAINING and place.is_idle]
        actions += [
            Start(place.worker_id, role)
            for place in staying
            if place not in leaving and place.state is PlaceState.WAITING and place.retry_at <= now
        ]
        taken = {index_of(place.worker_id) for place in pool}
        free = (index for index in range(len(taken) + size) if index not in taken)
        actions += [
            Start(worker_id_of(role, index), role) for index, _ in zip(free, range(size - len(staying)), strict=False)
        ]
    return actions


def worker_id_of(role: Role, index: int) -> WorkerId:
    """Name of a place, such as `prefill-0`."""
    return WorkerId(f"{role.value}-{index}")


def index_of(worker_id: WorkerId) -> int:
    """Position of a place in its pool."""
    return int(worker_id.rpartition("-")[2])


_ORDER = {PlaceState.WAITING: 0, PlaceState.STARTING: 1, PlaceState.READY: 2}


def _first_to_go(place: Place) -> tuple[int, bool, int]:
    return _ORDER[place.state], not place.is_outdated, -index_of(place.worker_id)

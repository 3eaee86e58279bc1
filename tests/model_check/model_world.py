"""The whole system around one request, as a state and its next states.

A state is a few small numbers: the router's part, the stations of the prefill and decode workers, and the faults that
are left. Every part is a value that is kept once and named by its number, and what happens to a part is worked out once
per part, however many states it occurs in. So the search runs the production transitions without paying for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain

import model_station as stations
import model_transfer as transfers
import model_worker as workers
from model_router import RouterSide, first_side, hear, horizon, lease_wanted, lose, route, routes, stop
from model_setting import REQUEST_ID, Setting
from model_state import CHOICE, FAULT, PROGRESS, Meeting, Next, State, Step, Store
from model_station import Station

from duopool.core.handoff.request import Member, Route, Send
from duopool.core.messages import AttemptRef, Heartbeat
from duopool.core.types import Incarnation, WorkerId


class World:
    """Next states of a state. Raises Violation when a step does what must never happen."""

    def __init__(self, setting: Setting, *, all_routes: bool = False) -> None:
        """With `all_routes` workers that the request has not touched are not taken as alike."""
        self.setting = setting
        self.names = tuple(f"P{n}" for n in range(setting.num_prefill)) + tuple(
            f"D{n}" for n in range(setting.num_decode)
        )
        self.places = range(1, 1 + len(self.names))
        self._all_routes = all_routes
        self._routers, self._stations = Store[RouterSide](), Store[Station]()
        self._place = {WorkerId(name): place for place, name in enumerate(self.names, start=1)}
        once = (self._about, self._tidy, self._alone, self._heard, self._push)
        once_too = (self._expired, self._open, self._transfer, self._routed, self._held)
        for work in (*once, *once_too):  # whatever happens to a part is worked out once
            setattr(self, work.__name__, cache(work))

    @property
    def first(self) -> State:
        router = first_side(self.setting)
        places = (self._stations.number(stations.new_station(name, self.setting)) for name in self.names)
        return (self._routers.number(router), *places, self.setting.num_faults)

    def router(self, state: State) -> RouterSide:
        return self._routers[state[0]]

    def station(self, state: State, place: int) -> Station:
        return self._stations[state[place]]

    def next_states(self, state: State) -> Iterator[Next]:
        """What may happen now."""
        for label, kind, _, after in self.steps(state):
            yield label, kind, after

    def steps(self, state: State) -> Iterator[Step]:
        """What may happen now, and what it means to other requests."""
        left = state[-1]
        _, at_p, at_d, has_ended = self._about(state[0])
        for place in self.places:
            number, is_prefill = state[place], place <= self.setting.num_prefill
            oldest = at_p if is_prefill else at_d
            for label, kind, meeting, after in self._alone(number, place, oldest, has_ended, left > 0):
                yield label, kind, meeting, _with(state, place, after, kind == FAULT)
            yield from self._to_router(state, place)
            if is_prefill:
                yield from self._expiry(state, place)
                yield from self._hung_up(state, place)
            else:
                yield from self._between(state, place)
        yield from self._of_router(state)

    # ---- what others see -------------------------------------------------------------------------------------------

    def held(self, state: State) -> tuple[int, ...]:
        """Tables that have blocks, worker by worker."""
        return tuple(map(self._held, state[1:-1]))

    def overwritten(self, state: State, place: int) -> State:
        """The state after another request took the room that is free at a worker."""
        return _with(state, place, self._stations.number(workers.overwritten(self.station(state, place))))

    def is_over(self, state: State) -> bool:
        """The request has ended, nothing is held anywhere and nothing is on the way."""
        return self.router(state).has_ended and not self._unquiet(state)

    def remains(self, state: State) -> str:
        """What is wrong with a state in which nothing more happens."""
        if not self.router(state).has_ended:
            return f"the request hangs: it is {self.router(state).state.phase.value} and nothing more happens"
        holders = [name for name, num_held in zip(self.names, self.held(state), strict=True) if num_held]
        if holders:
            return f"blocks are never given back at {' and '.join(holders)}"
        return " and ".join(f"{name} never forgets the request" for name in self._unquiet(state))

    def _held(self, number: int) -> int:
        return workers.num_held(self._stations[number])

    def _unquiet(self, state: State) -> tuple[str, ...]:
        """Workers that hold something, or to or from which something is on the way."""
        return tuple(
            name for place, name in enumerate(self.names, start=1) if not stations.is_quiet(self.station(state, place))
        )

    # ---- a worker alone --------------------------------------------------------------------------------------------

    def _alone(
        self, number: int, place: int, oldest: int, has_ended: bool, may_fail: bool
    ) -> list[tuple[str, int, Meeting | None, int]]:
        station, setting = self._stations[number], self.setting
        found: list[tuple[str, int, Meeting | None, Station]] = []
        for label, cost, after in chain(stations.deliveries(station, setting), workers.moves(station, setting)):
            found.append((label, FAULT if cost else PROGRESS, None, after))
        if setting.room is None or workers.num_held(station) < setting.room:
            for label, after in workers.admissions(station, setting):
                found.append((label, PROGRESS, Meeting("take", place), after))
        for label, what, after in stations.joint_moves(station, setting):
            found.append((label, FAULT, Meeting(what, place), after))
        return [
            (label, kind, meeting, self._tidy(self._stations.number(after), oldest, has_ended))
            for label, kind, meeting, after in found
            if may_fail or kind != FAULT
        ]

    # ---- the router ------------------------------------------------------------------------------------------------

    def _to_router(self, state: State, place: int) -> Iterator[Step]:
        for label, cost, what, router, after, sends in self._heard(state[0], state[place]):
            if cost <= state[-1]:
                meeting = Meeting(what, place) if what else None
                arrived = (router, *_with(state, place, after, cost)[1:])
                yield label, cost, meeting, self._tidied(self._sent(arrived, sends))

    def _heard(self, number: int, sender: int) -> list[tuple[str, int, str, int, int, tuple[Send, ...]]]:
        """What may reach the router: (label, faults, meeting, router, station, sends)."""
        router, station, found = self._routers[number], self._stations[sender], []
        for label, cost, member, event, after in stations.arriving(station, self.setting):
            heard, sends = hear(router, member, event, self.setting)
            found.append((label, cost, "", self._routers.number(heard), self._stations.number(after), sends))
        if station.is_broken:
            member = Member(station.side.worker_id, Incarnation(station.known))
            lost, sends = lose(router, member, self.setting)
            label = f"R notices that {member.worker_id} is gone"
            after = self._stations.number(stations.lost(station))
            found.append((label, PROGRESS, "notice", self._routers.number(lost), after, sends))
        return found

    def _of_router(self, state: State) -> Iterator[Step]:
        wants_route, *_, has_ended = self._about(state[0])
        if wants_route:
            known = tuple(self.station(state, place).known for place in self.places)
            untouched = frozenset(
                self.names[place - 1]
                for place in self.places
                if not self._all_routes and not self.station(state, place).is_touched
            )
            for label, router, sends in self._routed(state[0], known, untouched):
                yield label, PROGRESS, None, self._tidied(self._sent((router, *state[1:]), sends))
        if "ask" in self.setting.faults and not has_ended and state[-1] > 0:
            yield from self._asks(state)
        if self.setting.cancels and not has_ended:
            stopped, sends = stop(self.router(state), self.setting)
            after = self._sent((self._routers.number(stopped), *state[1:]), sends)
            yield "the client goes away", CHOICE, None, self._tidied(after)

    def _routed(
        self, number: int, known: Sequence[int], untouched: frozenset[str]
    ) -> list[tuple[str, int, tuple[Send, ...]]]:
        router = self._routers[number]
        lives = zip(self.names, known, strict=True)
        members = tuple(Member(WorkerId(name), Incarnation(life)) for name, life in lives)
        found = []
        for choice in routes(router, members, frozenset(map(WorkerId, untouched)), self.setting):
            after, sends = route(router, choice, self.setting)
            found.append((_name(choice), self._routers.number(after), sends))
        return found

    def _asks(self, state: State) -> Iterator[Step]:
        """A heartbeat asks a worker for the request; they are limited like faults."""
        for place in self.places:
            station = self.station(state, place)
            member = Member(station.side.worker_id, Incarnation(station.known))
            attempt = self.router(state).state.attempt_on(member)
            if attempt is not None:
                heartbeat = Heartbeat(attempts=(AttemptRef(REQUEST_ID, attempt),))
                after = self._sent(state, (Send(member, heartbeat),))
                label = f"R asks {member.worker_id} for attempt {attempt}"
                yield label, FAULT, None, self._tidied((*after[:-1], after[-1] - 1))

    def _sent(self, state: State, sends: tuple[Send, ...]) -> State:
        for send in sends:
            place = self._place[send.member.worker_id]
            state = _with(state, place, self._push(state[place], send))
        return state

    def _push(self, number: int, send: Send) -> int:
        after = stations.push(self._stations[number], send.member.incarnation, send.command, self.setting)
        return self._stations.number(after)

    def _about(self, number: int) -> tuple[bool, int, int, bool]:
        """Whether the router wants a route, the oldest attempts that it heeds of P and of D, whether it has ended."""
        router = self._routers[number]
        return router.wanted, horizon(router, "P"), horizon(router, "D"), router.has_ended

    def _tidied(self, state: State) -> State:
        """The state without messages that will be ignored."""
        _, at_p, at_d, has_ended = self._about(state[0])
        num_prefill = self.setting.num_prefill
        tidied = [self._tidy(state[place], at_p if place <= num_prefill else at_d, has_ended) for place in self.places]
        return (state[0], *tidied, state[-1])

    def _tidy(self, number: int, oldest: int, has_ended: bool) -> int:
        return self._stations.number(stations.tidy(self._stations[number], oldest, has_ended, self.setting))

    # ---- between prefill and decode workers ------------------------------------------------------------------------

    def _between(self, state: State, place: int) -> Iterator[Step]:
        for is_read, index, source in self._open(state[place]):
            label, here, there = self._transfer(is_read, state[place], index, state[source])
            after = _with(_with(state, place, here), source, there)
            yield label, PROGRESS, None, self._tidied(after)

    def _open(self, number: int) -> list[tuple[bool, int, int]]:
        station = self._stations[number]
        return [
            *((True, index, self._place[name]) for index, name in transfers.open_reads(station)),
            *((False, index, self._place[name]) for index, name in transfers.open_questions(station)),
        ]

    def _transfer(self, is_read: bool, number: int, index: int, source: int) -> tuple[str, int, int]:
        transfer = transfers.read if is_read else transfers.ask
        label, here, there = transfer(self._stations[number], index, self._stations[source], self.setting)
        return label, self._stations.number(here), self._stations.number(there)

    def _expiry(self, state: State, place: int) -> Iterator[Step]:
        expired = self._expired(state[0], state[place])
        if expired is not None and expired[1] <= state[-1]:
            yield expired[0], expired[1], None, _with(state, place, expired[2], expired[1])

    def _expired(self, number: int, holder: int) -> tuple[str, int, int] | None:
        """The holder's lease runs out, which is a fault if the router wants it."""
        router, station = self._routers[number], self._stations[holder]
        after, table = workers.expiry(station, self.setting), station.side.current
        if after is None or table is None:
            return None
        member = Member(station.side.worker_id, Incarnation(station.known))
        is_reached = not station.is_broken and station.known == station.incarnation
        is_wanted = is_reached and lease_wanted(router, member, table.attempt)
        if is_wanted and "ttl" not in self.setting.faults:
            return None
        why = "although it is wanted" if is_wanted else "as nobody wants it"
        return f"the lease of {member.worker_id} runs out, {why}", int(is_wanted), self._stations.number(after)

    def _hung_up(self, state: State, place: int) -> Iterator[Step]:
        if self.setting.one_sided:
            return
        listeners = [self.station(state, other) for other in self.places]
        for label, after in transfers.hang_ups(self.station(state, place), listeners, self.setting):
            yield label, PROGRESS, None, _with(state, place, self._stations.number(after))


def _with(state: State, place: int, number: int, cost: int = 0) -> State:
    return (*state[:place], number, *state[place + 1 : -1], state[-1] - cost)


def _name(choice: Route) -> str:
    prefill_name = "nobody" if choice.prefill is None else choice.prefill.worker_id
    return f"R routes to {prefill_name} and {choice.decode.worker_id}"

"""The whole system around one request, as a state and its next states.

A state is six small numbers: the router's part, the stations of two prefill and two decode workers, and the faults that
are left. Every part is a value that is kept once and named by its number, and what happens to a part is worked out once
per part, however many states it occurs in. So the search runs the production transitions without paying for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import model_decode as decode
import model_prefill as prefill
import model_station as stations
from model_decode import DecodeSide
from model_prefill import PrefillSide
from model_router import RouterSide, first_side, hear, horizon, lease_wanted, lose, route, routes, stop
from model_setting import Setting
from model_station import Station, show

from duopool.core.handoff.request import Member, Send
from duopool.core.types import Incarnation, WorkerId

State = tuple[int, ...]
"""Router, stations in the order of `names`, faults left."""
Next = tuple[str, int, State]
"""What happens, whether it is a fault (1), a choice of the client (2) or progress (0), and the state then."""

FAULT, CHOICE, PROGRESS = 1, 2, 0


class Store:
    """Values by number and numbers by value."""

    def __init__(self) -> None:
        self._values: list[Hashable] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: Hashable) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number

    def value(self, number: int) -> Hashable:
        return self._values[number]

    def __len__(self) -> int:
        return len(self._values)


class World:
    """Next states of a state. Raises Violation when a step does what must never happen."""

    def __init__(self, setting: Setting, *, reduces: bool = True) -> None:
        self.setting = setting
        guards = setting.guards
        self.reduces = reduces and guards.attempt_fence and guards.end_is_final and guards.incarnation_check
        self._calm = replace(setting, faults=frozenset())
        self.names = tuple(f"P{n}" for n in range(setting.num_prefill)) + tuple(
            f"D{n}" for n in range(setting.num_decode)
        )
        self._routers, self._stations = Store(), Store()
        self._known: dict[Hashable, object] = {}
        self._place = {WorkerId(name): 1 + index for index, name in enumerate(self.names)}

    @property
    def first(self) -> State:
        router = first_side(self.setting)
        places = (self._stations.number(stations.new_station(name)) for name in self.names)
        return (self._routers.number(router), *places, self.setting.num_faults)

    def router(self, state: State) -> RouterSide:
        return self._routers.value(state[0])  # type: ignore[return-value]

    def station(self, state: State, place: int) -> Station:
        return self._stations.value(state[place])  # type: ignore[return-value]

    def is_over(self, state: State) -> bool:
        """The request has ended, nothing is held anywhere and nothing is on the way."""
        return self.router(state).has_ended and not self.unquiet(state)

    def unquiet(self, state: State) -> tuple[str, ...]:
        """Workers that hold something, or to or from which something is on the way."""
        return tuple(
            name
            for place, name in enumerate(self.names, start=1)
            if not self._once(
                ("quiet", state[place]), lambda place=place: stations.is_quiet(self.station(state, place))
            )
        )

    def next_states(self, state: State) -> Iterator[Next]:
        """What may happen now; of steps whose order makes no difference only one order.

        Workers that only clear up what the router has given up are let go first: nothing that others do can reach them
        before they have heard what is on the way to them, and nobody heeds what they say. While the request lives and
        faults are left, a fault may join them to the rest again: then all orders are looked at. After its end nothing
        joins two groups of workers any more but the number of faults, and how many the first group takes is tried out.
        """
        may_reduce = self.reduces and (state[-1] == 0 or self.router(state).has_ended)
        places = self._clearing_up(state) if may_reduce else ()
        if places:
            for place in places:
                yield from self._of(state, place)
            return
        for place in range(1, len(state) - 1):
            yield from self._of(state, place)
        yield from self._router_moves(state)

    def _of(self, state: State, place: int) -> Iterator[Next]:
        """Steps in which a worker has a part."""
        num_faults = state[-1]
        for label, cost, station in self._local(state[place], num_faults > 0):
            if cost <= num_faults:
                yield label, cost, self._tidied(self._with(state, place, station, cost), place)
        yield from self._to_router(state, place)
        if self.names[place - 1].startswith("D"):
            yield from self._reads(state, place)
            yield from self._questions(state, place)
        else:
            yield from self._expiry(state, place)
            yield from self._hung_up(state, place)

    def _clearing_up(self, state: State) -> tuple[int, ...]:
        """A group of workers that nobody else has to do with and that still have something to do."""
        router = self.router(state)
        partners = [
            (place, self._sources(state, place)) for place in range(1 + self.setting.num_prefill, len(state) - 1)
        ]
        seen: set[int] = set()
        for start in range(1, len(state) - 1):
            if start in seen:
                continue
            group, grown = {start}, True
            while grown:
                grown = False
                for place, sources in partners:
                    touched = {place, *sources}
                    if touched & group and not touched <= group:
                        group |= touched
                        grown = True
            seen |= group
            if not all(self._is_given_up(router, state[0], state[place], place) for place in group):
                continue
            if any(kind == PROGRESS for place in group for _, kind, _ in self._of(state, place)):
                return tuple(sorted(group))
        return ()

    def _sources(self, state: State, place: int) -> tuple[int, ...]:
        """Places of the prefill workers whose answers to a decode worker can still change."""
        named: frozenset[tuple[WorkerId, int]] = self._once(  # type: ignore[assignment]
            ("sources", state[place]),
            lambda: stations.sources(self._stations.value(state[place])),  # type: ignore[arg-type]
        )
        return tuple(
            self._place[name]
            for name, table in named
            if state[-1] > 0  # a crash can still change what is found there
            or self._once(
                ("may hold", state[self._place[name]], table),
                lambda name=name, table=table: stations.may_hold(self.station(state, self._place[name]), table),
            )
        )

    def _is_given_up(self, router: RouterSide, router_number: int, number: int, place: int) -> bool:
        def work() -> bool:
            station: Station = self._stations.value(number)  # type: ignore[assignment]
            if self._is_untouched(number, self.names[place - 1]):
                return False
            if isinstance(station.side, PrefillSide) and self._is_wanted(router, station):
                return False
            return stations.is_given_up(station, horizon(router, station.side.worker_id), router.has_ended)

        return self._once(("given up", router_number, number), work)  # type: ignore[return-value]

    # ---- a worker alone --------------------------------------------------------------------------------------------

    def _local(self, number: int, may_fail: bool) -> list[tuple[str, int, int]]:
        def work() -> list[tuple[str, int, int]]:
            station: Station = self._stations.value(number)  # type: ignore[assignment]
            return [
                (label, cost, self._stations.number(after))
                for label, cost, after in stations.moves(station, self.setting if may_fail else self._calm)
            ]

        return self._once(("local", number, may_fail), work)  # type: ignore[return-value]

    @staticmethod
    def _with(state: State, place: int, number: int, cost: int = 0) -> State:
        changed = list(state)
        changed[place] = number
        changed[-1] -= cost
        return tuple(changed)

    # ---- the router ------------------------------------------------------------------------------------------------

    def _to_router(self, state: State, place: int) -> Iterator[Next]:
        number = state[place]
        for label, cost, message_number, after in self._arriving(number):
            if cost <= state[-1]:
                router, sends = self._heard(state[0], message_number)
                arrived = self._with(state, place, after, cost)
                yield (
                    label,
                    cost,
                    self._tidied(self._sent((router, *arrived[1:]), sends), None if router != state[0] else place),
                )

    def _arriving(self, number: int) -> list[tuple[str, int, int, int]]:
        """Messages that may reach the router from a station: (label, cost, message, station after)."""

        def work() -> list[tuple[str, int, int, int]]:
            station: Station = self._stations.value(number)  # type: ignore[assignment]
            name, setting, found = station.side.worker_id, self.setting, []
            member = Member(name, Incarnation(station.known))
            if station.events:
                event, taken = station.events[0], replace(station, events=station.events[1:])
                found.append((f"R hears {show(event)} from {name}", 0, (member, event), taken))
                if "double" in setting.faults:
                    late = tuple(sorted((*station.late_events, (station.known, event)), key=repr))
                    twice = replace(taken, late_events=late)
                    found.append(
                        (f"R hears {show(event)} from {name}, which will come again", 1, (member, event), twice)
                    )
            for index, (life, event) in enumerate(station.late_events):
                taken = replace(station, late_events=station.late_events[:index] + station.late_events[index + 1 :])
                sender = Member(name, Incarnation(life))
                found.append((f"R hears late {show(event)} from {name}", 0, (sender, event), taken))
            if station.is_broken:
                found.append((f"R notices that {name} is gone", 0, (member, None), stations.lost(station)))
            return [
                (label, cost, self._messages(message), self._stations.number(after))
                for label, cost, message, after in found
            ]

        return self._once(("arriving", number), work)  # type: ignore[return-value]

    def _messages(self, message: tuple[Member, object]) -> int:
        return self._routers.number(message)

    def _heard(self, router_number: int, message_number: int) -> tuple[int, tuple[Send, ...]]:
        def work() -> tuple[int, tuple[Send, ...]]:
            router: RouterSide = self._routers.value(router_number)  # type: ignore[assignment]
            member, event = self._routers.value(message_number)  # type: ignore[misc]
            after, sends = (
                lose(router, member, self.setting) if event is None else hear(router, member, event, self.setting)
            )
            return self._routers.number(after), sends

        return self._once(("heard", router_number, message_number), work)  # type: ignore[return-value]

    def _router_moves(self, state: State) -> Iterator[Next]:
        router = self.router(state)
        if router.wanted:
            members = tuple(
                Member(WorkerId(name), Incarnation(self.station(state, place).known))
                for place, name in enumerate(self.names, start=1)
            )
            untouched = frozenset(
                member.worker_id
                for place, member in enumerate(members, start=1)
                if self._is_untouched(state[place], member.worker_id)
            )
            for choice in self._routes(state[0], members, untouched):
                after, sends = self._routed(state[0], choice)
                prefill_name = "nobody" if choice.prefill is None else choice.prefill.worker_id
                yield (
                    f"R routes to {prefill_name} and {choice.decode.worker_id}",
                    0,
                    self._tidied(self._sent((after, *state[1:]), sends)),
                )
        if self.setting.cancels and not router.has_ended:
            after, sends = self._stopped(state[0])
            yield "the client goes away", CHOICE, self._tidied(self._sent((after, *state[1:]), sends))

    def _is_untouched(self, number: int, name: str) -> bool:
        return self._stations.value(number) == stations.new_station(name)

    def _routes(self, number: int, members, untouched):  # type: ignore[no-untyped-def]
        return self._once(
            ("routes", number, members, untouched),
            lambda: routes(self._routers.value(number), members, untouched, self.setting),  # type: ignore[arg-type]
        )

    def _routed(self, number: int, choice) -> tuple[int, tuple[Send, ...]]:  # type: ignore[no-untyped-def]
        def work() -> tuple[int, tuple[Send, ...]]:
            after, sends = route(self._routers.value(number), choice, self.setting)  # type: ignore[arg-type]
            return self._routers.number(after), sends

        return self._once(("routed", number, choice), work)  # type: ignore[return-value]

    def _stopped(self, number: int) -> tuple[int, tuple[Send, ...]]:
        def work() -> tuple[int, tuple[Send, ...]]:
            after, sends = stop(self._routers.value(number), self.setting)  # type: ignore[arg-type]
            return self._routers.number(after), sends

        return self._once(("stopped", number), work)  # type: ignore[return-value]

    def _sent(self, state: State, sends: tuple[Send, ...]) -> State:
        if not sends:
            return state
        changed = list(state)
        for send in sends:
            place = self._place[send.member.worker_id]
            number = changed[place]

            def work(number: int = number, send: Send = send) -> int:
                station: Station = self._stations.value(number)  # type: ignore[assignment]
                after = stations.push(station, send.member.incarnation, send.command, self.setting)
                return self._stations.number(after)

            changed[place] = self._once(("push", number, send), work)  # type: ignore[assignment]
        return tuple(changed)

    # ---- between prefill and decode workers ------------------------------------------------------------------------

    def _reads(self, state: State, place: int) -> Iterator[Next]:
        for index, source in self._open_reads(state[place]):
            source_place = self._place[source]
            found: list[tuple[str, int, int]] = self._once(  # type: ignore[assignment]
                ("read", state[place], index, state[source_place]),
                lambda index=index, source_place=source_place: self._read(state[place], index, state[source_place]),
            )
            for label, here, there in found:
                yield label, 0, self._tidied(self._with(self._with(state, place, here), source_place, there), place)

    def _open_reads(self, number: int) -> list[tuple[int, WorkerId]]:
        def work() -> list[tuple[int, WorkerId]]:
            side = self._stations.value(number).side  # type: ignore[attr-defined]
            return [(index, one.read.lease.worker_id) for index, one in enumerate(side.reads)]

        return self._once(("reads", number), work)  # type: ignore[return-value]

    def _read(self, number: int, index: int, source_number: int) -> list[tuple[str, int, int]]:
        station: Station = self._stations.value(number)  # type: ignore[assignment]
        source: Station = self._stations.value(source_number)  # type: ignore[assignment]
        side, giver, guards = station.side, source.side, self.setting.guards
        assert isinstance(side, DecodeSide)
        assert isinstance(giver, PrefillSide)
        one = side.reads[index]
        table = prefill.table_of(one.read.sources[0].block_id)
        what = f"{side.worker_id}'s read for attempt {one.attempt}"

        def over(content: str, error: str, giver: PrefillSide) -> tuple[int, int]:
            after, said = decode.read_ended(side, one, content, error, guards)
            silent = side.current is not None and side.current.is_silent
            here = stations._say(station, after, said, is_silent=silent)
            return self._stations.number(here), self._stations.number(replace(source, side=giver))

        if one.read.lease.incarnation != giver.incarnation and guards.incarnation_check:
            return [(f"{what} finds nobody", *over("", "gone", giver))]
        content = (
            "sealed" if prefill.holds(giver, table) and one.read.lease.incarnation == giver.incarnation else "other"
        )
        if self.setting.one_sided:
            return [(f"{what} ends and has found {content} pages", *over(content, "", giver))]
        if not one.is_served:
            begun = prefill.begin_read(giver, one.read.lease.lease_id, one.attempt, guards)
            if begun is None:
                return [(f"{what} is refused", *over("", "refused", giver))]
            here = self._stations.number(replace(station, side=decode.served(side, one)))
            return [(f"{what} begins to be served", here, self._stations.number(replace(source, side=begun)))]
        if content != "sealed":
            raise prefill.Violation(f"{giver.worker_id} serves blocks that it has given away")
        giver = prefill.end_read(giver, one.read.lease.lease_id, guards)
        return [(f"{what} ends well", *over(content, "", giver))]

    def _questions(self, state: State, place: int) -> Iterator[Next]:
        for key, source in self._open_questions(state[place]):
            source_place = self._place[source]
            label, here, there = self._once(  # type: ignore[misc]
                ("question", state[place], key, state[source_place]),
                lambda key=key, source_place=source_place: self._ask(state[place], key, state[source_place]),
            )
            yield label, 0, self._tidied(self._with(self._with(state, place, here), source_place, there), place)

    def _open_questions(self, number: int) -> list[tuple[int, WorkerId]]:
        """-1 is the question whose answer is waited for; others are late ones."""

        def work() -> list[tuple[int, WorkerId]]:
            station: Station = self._stations.value(number)  # type: ignore[assignment]
            table = station.side.current
            found = [(index, source) for index, (source, _) in enumerate(station.late_questions)]
            if table is not None and table.question is not None:  # type: ignore[union-attr]
                found.append((-1, table.question_to))  # type: ignore[union-attr]
            return found

        return self._once(("questions", number), work)  # type: ignore[return-value]

    def _ask(self, number: int, index: int, source_number: int) -> tuple[str, int, int]:
        station: Station = self._stations.value(number)  # type: ignore[assignment]
        source: Station = self._stations.value(source_number)  # type: ignore[assignment]
        side, giver = station.side, source.side
        assert isinstance(side, DecodeSide)
        assert isinstance(giver, PrefillSide)
        asked = side.current.question if index < 0 else station.late_questions[index][1]  # type: ignore[union-attr]
        assert asked is not None
        after, verdict = prefill.validate(giver, asked, self.setting.guards)
        there = self._stations.number(replace(source, side=after))
        says = f"{giver.worker_id} answers {side.worker_id} {'yes' if verdict.ok else 'no'}"
        if index < 0:
            silent = side.current is not None and side.current.is_silent
            here = stations._say(station, *decode.take_verdict(side, verdict, self.setting.guards), is_silent=silent)
            return f"{says} for attempt {asked.attempt}", self._stations.number(here), there
        left = station.late_questions[:index] + station.late_questions[index + 1 :]
        return f"{says}, too late", self._stations.number(replace(station, late_questions=left)), there

    def _expiry(self, state: State, place: int) -> Iterator[Next]:
        number = state[place]

        def work() -> int:
            after = stations.expiry(self._stations.value(number), self.setting)  # type: ignore[arg-type]
            return -1 if after is None else self._stations.number(after)

        after: int = self._once(("expiry", number), work)  # type: ignore[assignment]
        if after < 0:
            return
        station = self.station(state, place)
        wanted = self._once(("wanted", state[0], number), lambda: self._is_wanted(self.router(state), station))
        cost = 1 if wanted else 0
        if cost <= state[-1] and (not wanted or "ttl" in self.setting.faults):
            why = "although it is wanted" if wanted else "as nobody wants it"
            yield f"the lease of {station.side.worker_id} runs out, {why}", cost, self._with(state, place, after, cost)

    def _tidied(self, state: State, place: int | None = None) -> State:
        """The state without messages that will be ignored; at all stations, if the router has moved on."""
        router = self.router(state)
        has_ended = router.has_ended
        at_p, at_d = horizon(router, "P"), horizon(router, "D")
        changed: list[int] | None = None
        for one in range(1, len(state) - 1) if place is None else (place,):
            number, oldest = state[one], at_p if one <= self.setting.num_prefill else at_d
            key = ("tidy", number, oldest, has_ended)
            after = self._known.get(key)
            if after is None:
                station: Station = self._stations.value(number)  # type: ignore[assignment]
                after = self._stations.number(stations.tidy(station, oldest, has_ended, self.setting))
                self._known[key] = after
            if after != number:
                changed = changed or list(state)
                changed[one] = after  # type: ignore[call-overload]
        return state if changed is None else tuple(changed)

    def _hung_up(self, state: State, place: int) -> Iterator[Next]:
        """P serves somebody who does not listen any more: the call ends."""
        if self.setting.one_sided:
            return
        for table, num_readers in prefill.readers(self.station(state, place).side):  # type: ignore[arg-type]
            sides = [self.station(state, other).side for other in range(1 + self.setting.num_prefill, len(state) - 1)]
            num_open = sum(decode.num_served(side, self.names[place - 1], table) for side in sides)  # type: ignore[arg-type]
            if num_open < num_readers:
                station = self.station(state, place)
                ended = prefill.end_read(station.side, table, self.setting.guards)  # type: ignore[arg-type]
                number = self._stations.number(replace(station, side=ended))
                yield (
                    f"{self.names[place - 1]} finds that nobody listens to a read",
                    0,
                    self._with(state, place, number),
                )

    @staticmethod
    def _is_wanted(router: RouterSide, station: Station) -> bool:
        side = station.side
        assert isinstance(side, PrefillSide)
        if side.current is None or station.is_broken or station.known != station.incarnation:
            return False
        return lease_wanted(router, Member(side.worker_id, Incarnation(station.known)), side.current.attempt)

    def _once(self, key: Hashable, work: Callable[[], object]) -> object:
        known = self._known.get(key, self)
        if known is self:
            known = self._known[key] = work()
        return known

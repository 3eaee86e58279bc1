"""A worker with the wires between it and the router: what is said and heard, and what ends a session or a life.

Wires keep their order unless a fault says otherwise. A message that is late, or there twice, may arrive at any time.
A session that ends takes with it what is on its wires; whatever the worker holds for it falls silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import model_decode as decode
import model_prefill as prefill
from model_decode import DecodeSide
from model_prefill import PrefillSide
from model_setting import Setting

from duopool.core.handoff.request import Member
from duopool.core.messages import Cancel, Command, Event, Heartbeat, Nack, NackReason, Prefill, Reserve, Validate
from duopool.core.types import Incarnation, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """One worker's place: the life that fills it, the life that the router knows, and what is on the way."""

    incarnation: int = 1
    known: int = 1
    """The life that the router talks to."""
    side: PrefillSide | DecodeSide
    commands: tuple[Command, ...] = ()
    events: tuple[Event, ...] = ()
    late_commands: tuple[tuple[int, int, Command], ...] = ()
    """With the life and the session that they were sent to."""
    late_events: tuple[tuple[int, Event], ...] = ()
    late_questions: tuple[tuple[WorkerId, Validate], ...] = ()
    """Validates that D does not wait for any more."""
    num_sessions: int = 1
    is_broken: bool = False
    """The session ended and the router has not noticed."""
    is_touched: bool = False
    """The request has been sent here."""


Move = tuple[str, int, Station]
"""What happens, how many faults it takes, and what the station is then."""


def new_station(worker_id: str, setting: Setting) -> Station:
    if worker_id.startswith("D"):
        return Station(side=DecodeSide(worker_id=WorkerId(worker_id)))
    incarnation = Incarnation(1)
    return Station(
        side=PrefillSide(worker_id=WorkerId(worker_id), incarnation=incarnation, pages_stay=setting.pages_stay)
    )


def push(station: Station, member_incarnation: int, command: Command, setting: Setting) -> Station:
    """The router sends a command; a session that is gone takes nothing."""
    station = replace(station, is_touched=True)
    if station.is_broken:
        return station
    if member_incarnation != station.incarnation and setting.guards.incarnation_check:
        return station
    if isinstance(command, Cancel) and command in station.commands:
        return station  # it would find nothing left to do
    return replace(station, commands=(*station.commands, command))


def crash(station: Station) -> Station:
    """The worker dies and is started again, empty."""
    incarnation, side = station.incarnation + 1, station.side
    if isinstance(side, PrefillSide):
        empty: PrefillSide | DecodeSide = PrefillSide(
            worker_id=side.worker_id, incarnation=Incarnation(incarnation), pages_stay=side.pages_stay
        )
    else:
        empty = DecodeSide(worker_id=side.worker_id)
    return replace(
        station,
        incarnation=incarnation,
        side=empty,
        commands=(),
        late_commands=tuple(one for one in station.late_commands if one[0] == incarnation),
        late_questions=(),
        is_broken=True,
    )


def lost(station: Station) -> Station:
    """The router has noticed the end of the session and opened another, to whoever is there."""
    return replace(station, known=station.incarnation, commands=(), events=(), is_broken=False)


def joint_moves(station: Station, setting: Setting) -> Iterator[tuple[str, str, Station]]:
    """Faults that all requests of a worker see."""
    name = station.side.worker_id
    if "break" in setting.faults and not station.is_broken:
        yield f"the session with {name} ends", "break", _broken(station)
    if "crash" in setting.faults:
        yield f"{name} dies and comes back empty", "crash", crash(station)


def arriving(station: Station, setting: Setting) -> Iterator[tuple[str, int, Member, Event, Station]]:
    """Messages that may reach the router: what happens, faults, from whom, the message, and the station then."""
    name = station.side.worker_id
    if station.events:
        event, taken = station.events[0], replace(station, events=station.events[1:])
        sender = Member(name, Incarnation(station.known))
        yield f"R hears {show(event)} from {name}", 0, sender, event, taken
        if "double" in setting.faults:
            twice = replace(taken, late_events=_with_late(station, event))
            yield f"R hears {show(event)} from {name}, which will come again", 1, sender, event, twice
    for index, (life, event) in enumerate(station.late_events):
        taken = replace(station, late_events=station.late_events[:index] + station.late_events[index + 1 :])
        yield f"R hears late {show(event)} from {name}", 0, Member(name, Incarnation(life)), event, taken


def _with_late(station: Station, event: Event) -> tuple[tuple[int, Event], ...]:
    return tuple(sorted((*station.late_events, (station.known, event)), key=repr))


def deliveries(station: Station, setting: Setting) -> Iterator[Move]:
    """A worker hears a command, or the wire keeps a message back."""
    name = station.side.worker_id
    if station.commands:
        command, rest = station.commands[0], station.commands[1:]
        taken = replace(station, commands=rest)
        late = (*station.late_commands, (station.known, station.num_sessions, command))
        yield f"{name} hears {show(command)}", 0, _hear(taken, command, setting)
        if "double" in setting.faults:
            yield (
                f"{name} hears {show(command)}, which will come again",
                1,
                replace(_hear(taken, command, setting), late_commands=late),
            )
        if "delay" in setting.faults and rest:
            yield f"{show(command)} to {name} is delayed", 1, replace(taken, late_commands=late)
        if "busy" in setting.faults and isinstance(command, Prefill | Reserve):
            yield f"{name} is too busy for {show(command)}", 1, _hear(taken, command, setting, busy=True)
    for index, (incarnation, session, command) in enumerate(station.late_commands):
        taken = replace(station, late_commands=station.late_commands[:index] + station.late_commands[index + 1 :])
        if incarnation == station.incarnation or not setting.guards.incarnation_check:
            is_old = session != station.num_sessions
            yield f"{name} hears late {show(command)}", 0, _hear(taken, command, setting, is_old=is_old)
        else:
            yield f"late {show(command)} finds another life of {name}", 0, taken
    if station.events:
        event, rest_events = station.events[0], station.events[1:]
        if "delay" in setting.faults and rest_events:
            late = replace(station, events=rest_events, late_events=_with_late(station, event))
            yield f"{show(event)} from {name} is delayed", 1, late


def _hear(station: Station, command: Command, setting: Setting, *, busy: bool = False, is_old: bool = False) -> Station:
    """A command is heard; what it begins over a session that is over is as silent as the session."""
    if is_old:
        heard = replace(_hear(replace(station, is_broken=True), command, setting), is_broken=station.is_broken)
        if not isinstance(command, Prefill | Reserve):
            return heard
        was, now = station.side.current, heard.side.current
        is_again = was is not None and now is not None and was.attempt == now.attempt
        return replace(heard, side=station.side) if is_again else _silenced(heard)
    side = station.side
    if isinstance(side, PrefillSide):
        return say(station, *prefill.hear(side, command, setting, busy=busy))
    return say(station, *decode.hear(side, command, setting.guards, busy=busy))


def say(
    station: Station, side: PrefillSide | DecodeSide, said: tuple[Event | Command, ...], *, is_silent: bool = False
) -> Station:
    if isinstance(side, PrefillSide):
        prefill.check(side)
    else:
        decode.check(side)
    if is_silent or station.is_broken:
        said = ()
    return replace(station, side=side, events=station.events + said)  # type: ignore[operator]


def _broken(station: Station) -> Station:
    return replace(_silenced(station), commands=(), is_broken=True, num_sessions=station.num_sessions + 1)


def _silenced(station: Station) -> Station:
    side = station.side
    side = prefill.fall_silent(side) if isinstance(side, PrefillSide) else decode.fall_silent(side)
    return replace(station, side=side)


def show(message: object) -> str:
    """A message in a few words."""
    name, attempt = type(message).__name__, getattr(message, "attempt", "?")
    match message:
        case Prefill(request=request) | Reserve(request=request) if request.output_token_ids:
            return f"{name}(attempt {attempt}, {len(request.output_token_ids)} tokens out)"
        case Heartbeat(attempts=attempts):
            return f"Heartbeat(attempt {attempts[0].attempt})"
        case Cancel():
            return f"Cancel(attempt {attempt})"
        case _ if hasattr(message, "first_block"):
            token = ", first token" if message.first_token is not None else ""
            listed = f"block {message.first_block}" if message.blocks else "no block"
            return f"BlocksReady(attempt {attempt}, {listed}{token})"
        case _ if hasattr(message, "index"):
            last = ", last" if message.finish_reason else ""
            return f"Tokens(attempt {attempt}, index {message.index}{last})"
        case _ if hasattr(message, "reason"):
            return f"Nack(attempt {attempt}, {NackReason(message.reason).value})"
        case _:
            return f"{name}(attempt {attempt})"


def tidy(station: Station, oldest: int, has_ended: bool, setting: Setting) -> Station:
    """Without the messages that nobody will ever heed: they would only be looked at in every order."""
    side, guards = station.side, setting.guards
    if guards.attempt_fence and guards.end_is_final:

        def is_noise(event: Event) -> bool:
            if has_ended:
                return isinstance(event, Nack) or getattr(event, "finish_reason", None) is not None
            return event.attempt < oldest  # type: ignore[union-attr]

        if any(is_noise(one) for one in station.events) or any(is_noise(one) for _, one in station.late_events):
            station = replace(
                station,
                events=tuple(one for one in station.events if not is_noise(one)),
                late_events=tuple(one for one in station.late_events if not is_noise(one[1])),
            )
    if guards.tombstones and guards.incarnation_check:
        commands = tuple(one for one in station.commands if _attempt(one) > side.buried)  # type: ignore[union-attr]
        late = tuple(
            one
            for one in station.late_commands
            if one[0] == station.incarnation and _attempt(one[-1]) > side.buried  # type: ignore[union-attr]
        )
        if (commands, late) != (station.commands, station.late_commands):
            station = replace(station, commands=commands, late_commands=late)
    return station


def _attempt(command: Command) -> float:
    """The attempt that a command belongs to; a heartbeat is always heard."""
    return inf if isinstance(command, Heartbeat) else command.attempt  # type: ignore[union-attr]


def is_quiet(station: Station) -> bool:
    """Nothing is held and nothing is on the way."""
    side = station.side
    holds = not (prefill.is_empty(side) if isinstance(side, PrefillSide) else decode.is_empty(side))
    wires = station.commands or station.events or station.late_commands or station.late_events
    return not (holds or wires or station.late_questions or station.is_broken)

"""Carries out what was planned to go wrong, at its time or at its moment."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from duopool.core.messages import CommandBatch, StepReport
from duopool.core.types import RequestId
from duopool.proto import codec

from .client import Client
from .cluster import Cluster
from .scenario import (
    CHAOS_S,
    SEEDS_APART,
    THERE,
    Abandon,
    Break,
    ClockJump,
    Crash,
    Drain,
    Fault,
    Forget,
    Moment,
    Partition,
    Planned,
    Stall,
    TransferTrouble,
    Wild,
)
from .transport import Troubles

LATENESS_S = 0.6
"""Single messages in the wild come at most so late."""


class Faults:
    """Waits for the moments of one run and spoils it as planned."""

    def __init__(self, cluster: Cluster, clients: Sequence[Client]) -> None:
        self._cluster = cluster
        self._clients = clients
        self._time = cluster.time
        self._random = cluster.draw()
        self._num_moments = Counter[str]()
        self._awaited: dict[tuple[str, int], list[Planned]] = defaultdict(list)
        cluster.laws.on_moment = self._moment
        cluster.exchange.on_read = lambda process: self._moment("Read", process.place, RequestId(""))

    def arrange(self, plan: Sequence[Planned]) -> None:
        for planned in plan:
            if isinstance(planned.when, Moment):
                self._awaited[planned.when.kind, planned.when.number].append(planned)
            else:
                self._time.at(planned.when, lambda fault=planned.fault: self._befall(fault))

    def _moment(self, kind: str, place: str, request_id: RequestId) -> None:
        """Something happened for the n-th time: faults may have waited for it."""
        self._num_moments[kind] += 1
        for planned in self._awaited.pop((kind, self._num_moments[kind]), ()):
            assert isinstance(planned.when, Moment)
            fault = _at_place(planned.fault, place)
            when = self._time.now + planned.when.after_s
            if when < CHAOS_S:
                # Not at once: what is happening now has to happen whole.
                self._time.at(when, lambda fault=fault: self._befall(fault, request_id))

    def _befall(self, fault: Fault, request_id: RequestId | None = None) -> None:
        cluster, network, exchange = self._cluster, self._cluster.network, self._cluster.exchange
        laws = cluster.laws
        cluster.history.note("fault", _words(fault))
        laws.quiet_from = max(laws.quiet_from, self._time.now + _lasts_s(fault))
        match fault:
            case Crash():
                cluster.crash(fault)
            case Stall(place=place, for_s=for_s):
                cluster.process_at(place).stand_still(for_s)
            case ClockJump(place=place, by_s=by_s):
                self._time.jump(cluster.process_at(place), by_s)
            case Partition(source=source, target=target, for_s=for_s, one_way=one_way):
                network.hold(source, target, self._time.now + for_s)
                if not one_way:
                    network.hold(target, source, self._time.now + for_s)
            case Break(one=one, other=other, one_after_s=one_after_s, other_after_s=other_after_s):
                for stream in network.streams(one, other):
                    after = {one: one_after_s, other: other_after_s}
                    stream.break_off(after[stream.client.place], after[stream.place])
            case TransferTrouble():
                exchange.troubles = Troubles(
                    lost_question=fault.lost,
                    lost_answer=fault.lost,
                    doubled_question=fault.doubled,
                    slow=fault.slow,
                    slowness_s=fault.slowness_s,
                    damaged_page=fault.damaged,
                )
                self._time.at(self._time.now + fault.for_s, lambda: setattr(exchange, "troubles", Troubles()))
            case Wild():
                network.perturb = lambda kind, data: self._perturb(fault, kind, data)
                self._time.at(self._time.now + fault.for_s, lambda: setattr(network, "perturb", None))
            case Drain(place=place):
                cluster.drain(place)
            case Forget(place=place):
                cluster.forget(place)
            case Abandon():
                seed = None if request_id is None else laws.ask_of.get(request_id)
                for client in self._clients:
                    if seed is not None and client.ask.params.seed == seed - seed % SEEDS_APART:
                        client.process.plan(0.0, client.abandon)

    def _perturb(self, wild: Wild, kind: str, data: bytes) -> list[tuple[float, bytes]]:
        """Take a batch apart and lose, double or hold back single messages."""
        batch = codec.decode_commands(data).commands if kind == "commands" else codec.decode_report(data).events
        kept: list[object] = []
        parts: list[tuple[float, bytes]] = []

        def pack(messages: tuple[object, ...]) -> bytes:
            if kind == "commands":
                return codec.encode(CommandBatch(commands=messages))  # type: ignore[arg-type]
            return codec.encode(StepReport(events=messages))  # type: ignore[arg-type]

        for message in batch:
            draw = self._random.random()
            if draw < wild.lost:
                continue
            if draw < wild.lost + wild.overtaken:
                parts.append((LATENESS_S * self._random.random(), pack((message,))))
                continue
            kept.append(message)
            if self._random.random() < wild.doubled:
                parts.append((LATENESS_S * self._random.random(), pack((message,))))
        return [(0.0, pack(tuple(kept))), *parts]


def _at_place(fault: Fault, place: str) -> Fault:
    """The fault at the worker where its moment came."""
    fields = ("place", "source", "target", "one", "other")
    return replace(fault, **{name: place for name in fields if getattr(fault, name, None) == THERE})


def _lasts_s(fault: Fault) -> float:
    """How long it takes until the system could be as before."""
    match fault:
        case Crash(back_after_s=back_after_s):
            return back_after_s
        case Stall(for_s=for_s) | Partition(for_s=for_s) | Wild(for_s=for_s):
            return for_s
        case TransferTrouble(for_s=for_s, slowness_s=slowness_s):
            return for_s + slowness_s
        case ClockJump(by_s=by_s):
            return by_s
        case _:
            return 0.5


def _words(fault: Fault) -> str:
    fields = {name: getattr(fault, name) for name in fault.__dataclass_fields__}
    rest = ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
    )
    return f"{type(fault).__name__} {rest}"

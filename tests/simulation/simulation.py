"""One run: a seed becomes a system, its faults befall it, and in the end every law is looked at."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from duopool.core.messages import CommandBatch, StepReport, WorkerInfo
from duopool.core.types import RequestId
from duopool.proto import codec

from .client import Client
from .history import History
from .laws import Laws
from .lives import RouterLife, WorkerLife, start_router, start_worker
from .network import Network
from .scenario import (
    CHAOS_S,
    THERE,
    Abandon,
    Break,
    ClockJump,
    Crash,
    Drain,
    Fault,
    Moment,
    Partition,
    Planned,
    Scenario,
    Stall,
    TransferTrouble,
    Wild,
    scenario,
)
from .transport import READ_TIMEOUT_S, Exchange, Troubles
from .virtual_time import Process, VirtualTime

AUDIT_S = 0.1
"""Every worker's own check, this often."""
LATENESS_S = 0.6
"""Single messages in the wild come at most so late."""
ENDING_S = 60.0
"""All requests must have ended this long after the last fault began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    breaches: tuple[str, ...]
    digest: str
    endings: tuple[str, ...]
    num_entries: int
    virtual_s: float
    plan: tuple[Planned, ...]
    history: History = field(repr=False)

    @property
    def is_good(self) -> bool:
        return not self.breaches

    def without_history(self) -> Outcome:
        """Small enough to be sent to another process."""
        return replace(self, history=History(float))


def simulate(seed: int) -> Outcome:
    """Run one seed to its end."""
    return Simulation(scenario(seed)).run()


class Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.time = VirtualTime()
        self.history = History(lambda: self.time.now)
        self.laws = Laws(clock=lambda: self.time.now, has_digests=scenario.has_digests)
        self.random = Random(scenario.seed ^ 0x5EED)
        self.network = Network(self.time, self._draw(), self.history)
        self.exchange = Exchange(
            self.network, self._draw(), one_sided=scenario.one_sided, has_digests=scenario.has_digests
        )
        self.exchange.on_verdict = self._judge
        self.exchange.on_read = lambda process: self._moment("Read", process.place, RequestId(""))
        self.laws.on_moment = self._moment
        self.workers: dict[str, WorkerLife] = {}
        self.routers: dict[str, RouterLife] = {}
        self.clients: list[Client] = []
        self._num_lives = 0
        self._members: dict[str, WorkerInfo] = {}
        """As the supervisor knows them."""
        self._wild = self._draw()
        self._num_moments = Counter[str]()
        self._awaited: dict[tuple[str, int], list[Planned]] = defaultdict(list)

    def _draw(self) -> Random:
        """Randomness of its own for every part, so that one part's draws do not move another's."""
        return Random(self.random.getrandbits(64))

    def run(self) -> Outcome:
        scenario, time, laws = self.scenario, self.time, self.laws
        if scenario.plan:
            laws.patience_s = scenario.timers.orphan_ttl_s + 0.5
        laws.asks = {ask.params.seed: ask for ask in scenario.asks}
        errors = _Errors(laws)
        logging.getLogger("duopool").addHandler(errors)
        try:
            self._start()
            time.run(CHAOS_S + ENDING_S, stop=lambda: bool(laws.breaches) or self._all_ended())
            if not laws.breaches:
                self._settle()
        except Exception as error:
            laws.breach(f"the simulation itself failed: {error!r}")
            raise
        finally:
            outcome_s = time.now
            self.history.is_closed = True
            time.close()
            logging.getLogger("duopool").removeHandler(errors)
        for failure in time.failures:
            laws.breach(f"nobody caught: {failure}")
        return Outcome(
            seed=scenario.seed,
            breaches=tuple(laws.breaches),
            digest=self.history.digest(),
            endings=tuple(", ".join(client.endings) or "none" for client in self.clients),
            num_entries=len(self.history),
            virtual_s=outcome_s,
            plan=scenario.plan,
            history=self.history,
        )

    # ---- beginning and end -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for place in self.scenario.workers:
            self._start_worker(place)
        for place in self.scenario.routers:
            self._start_router(place)
        process = self.time.process("client")
        for ask in self.scenario.asks:
            client = Client(ask, process, self.network, self.scenario.routers, self.laws)
            self.clients.append(client)
            client.start()
        for planned in self.scenario.plan:
            if isinstance(planned.when, Moment):
                self._awaited[planned.when.kind, planned.when.number].append(planned)
            else:
                self.time.at(planned.when, lambda fault=planned.fault: self._befall(fault))
        self.time.at(AUDIT_S, self._audit)

    def _all_ended(self) -> bool:
        now = self.time.now
        return now >= max(CHAOS_S, self.laws.quiet_from) and all(client.endings for client in self.clients)

    def _settle(self) -> None:
        """Everything ends by itself or by time: then nothing is held anywhere."""
        laws = self.laws
        for client in self.clients:
            if not client.endings:
                laws.breach(f"request {client.ask.params.seed} has not ended, {len(client.tokens)} tokens came")
            elif client.endings[0].startswith("failed") and not self._may_fail(client):
                laws.breach(f"request {client.ask.params.seed} {client.endings[0]}")
        timers = self.scenario.timers
        until = self.time.now + max(timers.lease_ttl_s, timers.orphan_ttl_s, READ_TIMEOUT_S) + 3.0
        self.time.run(until, stop=lambda: bool(laws.breaches))
        if laws.breaches:
            return
        for router in self.routers.values():
            if router.pools.num_requests:
                laws.breach(f"{router.process.place} still has {router.pools.num_requests} requests")
        for place, life in self.workers.items():
            manager = life.manager
            if not life.worker.is_idle:
                laws.breach(f"{place} still holds requests, leases or reads")
            elif manager.num_available != manager.num_blocks:
                laws.breach(f"{place}: {manager.num_available} of {manager.num_blocks} blocks are free or cached")

    def _may_fail(self, client: Client) -> bool:
        return client.ask.timeout_s is not None and client.endings[0] == "failed: DEADLINE_EXCEEDED"

    def _audit(self) -> None:
        for place, life in self.workers.items():
            if life.process.is_alive:
                try:
                    life.watched.check()
                except AssertionError as error:
                    self.laws.breach(f"{place} is not in order: {_where(error)}")
        self.time.at(self.time.now + AUDIT_S, self._audit)

    # ---- lives -------------------------------------------------------------------------------------------------------

    def _process(self, place: str) -> Process:
        process = self.time.process(place)
        process.clock_offset = 100.0 + 1000.0 * self.random.random()  # clocks of two processes never agree
        return process

    def _start_worker(self, place: str) -> None:
        self._num_lives += 1
        port = 1 if self.scenario.keeps_addresses else self._num_lives
        process = self._process(place)
        life = start_worker(
            self.scenario,
            process,
            f"{place}:{port}",
            network=self.network,
            exchange=self.exchange,
            laws=self.laws,
            random=self._draw(),
        )
        self.workers[place] = life
        self._members[place] = life.info
        self.history.note(place, f"starts at {life.info.address}")
        self._publish()

    def _start_router(self, place: str) -> None:
        process = self._process(place)
        self.history.note(place, "starts")
        self.routers[place] = start_router(
            self.scenario,
            process,
            network=self.network,
            laws=self.laws,
            random=self._draw(),
            members=self._membership,
        )

    def _membership(self) -> list[WorkerInfo]:
        return list(self._members.values())

    def _publish(self) -> None:
        """The supervisor tells every router who there is; each hears of it in its own time."""
        for router in self.routers.values():
            router.process.plan(
                0.3 * self.random.random(),
                lambda router=router: router.process.start(lambda: router.pools.update(self._membership())),
            )

    # ---- faults ------------------------------------------------------------------------------------------------------

    def _moment(self, kind: str, place: str, request_id: RequestId) -> None:
        """Something happened for the n-th time: faults may have waited for it."""
        self._num_moments[kind] += 1
        for planned in self._awaited.pop((kind, self._num_moments[kind]), ()):
            assert isinstance(planned.when, Moment)
            fault = _at_place(planned.fault, place)
            when = self.time.now + planned.when.after_s
            if when < CHAOS_S:
                # Not at once: what is happening now has to happen whole.
                self.time.at(when, lambda fault=fault: self._befall(fault, request_id))

    def _befall(self, fault: Fault, request_id: RequestId | None = None) -> None:
        self.history.note("fault", _words(fault))
        self.laws.quiet_from = max(self.laws.quiet_from, self.time.now + _lasts_s(fault))
        match fault:
            case Crash():
                self._crash(fault)
            case Stall(place=place, for_s=for_s):
                self._living(place).stand_still(for_s)
            case ClockJump(place=place, by_s=by_s):
                self.time.jump(self._living(place), by_s)
            case Partition(source=source, target=target, for_s=for_s, one_way=one_way):
                self.network.hold(source, target, self.time.now + for_s)
                if not one_way:
                    self.network.hold(target, source, self.time.now + for_s)
            case Break(one=one, other=other, one_after_s=one_after_s, other_after_s=other_after_s):
                for stream in self.network.streams(one, other):
                    after = {one: one_after_s, other: other_after_s}
                    stream.break_off(after[stream.client.place], after[stream.place])
            case TransferTrouble():
                self.exchange.troubles = Troubles(
                    lost_question=fault.lost,
                    lost_answer=fault.lost,
                    doubled_question=fault.doubled,
                    slow=fault.slow,
                    slowness_s=fault.slowness_s,
                    damaged_page=fault.damaged,
                )
                self.time.at(self.time.now + fault.for_s, lambda: setattr(self.exchange, "troubles", Troubles()))
            case Wild():
                self.network.perturb = lambda kind, data: self._perturb(fault, kind, data)
                self.time.at(self.time.now + fault.for_s, lambda: setattr(self.network, "perturb", None))
            case Drain(place=place):
                self._drain(place)
            case Abandon():
                seed = None if request_id is None else self.laws.ask_of.get(request_id)
                for client in self.clients:
                    if client.ask.params.seed == seed:
                        client.process.plan(0.0, client.abandon)

    def _living(self, place: str) -> Process:
        return self.workers[place].process if place in self.workers else self.routers[place].process

    def _crash(self, crash: Crash) -> None:
        process = self._living(crash.place)
        if not process.is_alive:
            return
        process.die(says_goodbye=not crash.silent)
        if crash.place in self.routers:
            self.time.at(self.time.now + crash.back_after_s, lambda: self._start_router(crash.place))
            return
        info = self._members[crash.place]

        def notice() -> None:
            if self._members.get(crash.place) is info:
                del self._members[crash.place]
                self._publish()

        self.time.at(self.time.now + crash.back_after_s * self.random.random(), notice)
        self.time.at(self.time.now + crash.back_after_s, lambda: self._start_worker(crash.place))

    def _drain(self, place: str) -> None:
        life = self.workers[place]
        if not life.process.is_alive or place not in self._members:
            return
        life.process.start(life.worker.drain)
        self._members[place] = msgspec.structs.replace(life.info, draining=True)
        self._publish()

        def replace_when_idle() -> None:
            if self.workers[place] is not life or not life.process.is_alive:
                return
            if life.worker.is_idle:
                life.process.die(says_goodbye=True)
                self._start_worker(place)
            else:
                self.time.at(self.time.now + 0.2, replace_when_idle)

        self.time.at(self.time.now + 0.5, replace_when_idle)

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
            draw = self._wild.random()
            if draw < wild.lost:
                continue
            if draw < wild.lost + wild.overtaken:
                parts.append((LATENESS_S * self._wild.random(), pack((message,))))
                continue
            kept.append(message)
            if self._wild.random() < wild.doubled:
                parts.append((LATENESS_S * self._wild.random(), pack((message,))))
        return [(0.0, pack(tuple(kept))), *parts]

    def _judge(self, source: object, asked: object, verdict: object) -> None:
        for life in self.workers.values():
            if life.process is source.process:  # type: ignore[attr-defined]
                life.watched.judges(asked, verdict)  # type: ignore[arg-type]


class _Errors(logging.Handler):
    """What production logs as an error is a mistake of ours."""

    def __init__(self, laws: Laws) -> None:
        super().__init__(logging.ERROR)
        self._laws = laws

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        where = "" if error is None else f": {_where(error)}"
        self._laws.breach(f"logged an error: {record.getMessage()}{where}")


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


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_code.co_qualname} line {trace.tb_lineno}"
    return f"{error!r}{place}"


def _words(fault: Fault) -> str:
    fields = {name: getattr(fault, name) for name in fault.__dataclass_fields__}
    rest = ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
    )
    return f"{type(fault).__name__} {rest}"

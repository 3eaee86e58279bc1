"""The system under simulation: its processes, and a supervisor that starts them anew and tells routers of them."""

from __future__ import annotations

from random import Random

import msgspec

from duopool.core.messages import Validate, Verdict, WorkerInfo

from .history import History
from .laws import Laws
from .lives import RouterLife, WorkerLife, start_router, start_worker
from .network import Network
from .scenario import Crash, Scenario
from .transport import Exchange, Source
from .virtual_time import Process, VirtualTime


class Cluster:
    """Everything but the clients. Of each place the life that is there now, dead or alive."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.time = VirtualTime()
        self.history = History(lambda: self.time.now)
        self.laws = Laws(clock=lambda: self.time.now, has_digests=scenario.has_digests)
        self.random = Random(scenario.seed ^ 0x5EED)
        self.network = Network(self.time, self.draw(), self.history)
        self.exchange = Exchange(
            self.network, self.draw(), one_sided=scenario.one_sided, has_digests=scenario.has_digests
        )
        self.exchange.on_verdict = self._judge
        self.workers: dict[str, WorkerLife] = {}
        self.routers: dict[str, RouterLife] = {}
        self._members: dict[str, WorkerInfo] = {}
        """As the supervisor knows them."""
        self._num_lives = 0

    def draw(self) -> Random:
        """Randomness of its own for every part, so that one part's draws do not move another's."""
        return Random(self.random.getrandbits(64))

    def start(self) -> None:
        for place in self.scenario.workers:
            self._start_worker(place)
        for place in self.scenario.routers:
            self._start_router(place)

    def process_at(self, place: str) -> Process:
        return self.workers[place].process if place in self.workers else self.routers[place].process

    def crash(self, crash: Crash) -> None:
        """Kill a process. A worker is missed after a while; whatever it was, it is started again."""
        process = self.process_at(crash.place)
        if not process.is_alive:
            return
        process.die(says_goodbye=not crash.silent)
        if crash.place in self.routers:
            self.time.at(self.time.now + crash.back_after_s, lambda: self._start_router(crash.place))
            return
        self.laws.num_deaths += 1
        info = self._members[crash.place]

        def notice() -> None:
            if self._members.get(crash.place) is info:
                del self._members[crash.place]
                self._publish()

        self.time.at(self.time.now + crash.back_after_s * self.random.random(), notice)
        self.time.at(self.time.now + crash.back_after_s, lambda: self._start_worker(crash.place))

    def drain(self, place: str) -> None:
        """Let a worker take nothing new, and replace it once it is idle."""
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
                self.laws.num_deaths += 1
                life.process.die(says_goodbye=True)
                self._start_worker(place)
            else:
                self.time.at(self.time.now + 0.2, replace_when_idle)

        self.time.at(self.time.now + 0.5, replace_when_idle)

    def forget(self, place: str) -> None:
        """Let a worker drop a request and say nothing of it."""
        life = self.workers[place]

        def drop() -> None:
            if requests := life.worker._requests:
                request = requests[self.random.choice(sorted(requests))]
                life.worker._end(request, now=life.process.clock())  # type: ignore[arg-type]

        if life.process.is_alive:
            life.process.start(drop)

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
            random=self.draw(),
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
            random=self.draw(),
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

    def _judge(self, source: Source, asked: Validate, verdict: Verdict) -> None:
        for life in self.workers.values():
            if life.process is source.process:
                life.watched.judges(asked, verdict)

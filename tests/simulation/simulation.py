"""One run: a seed becomes a system, its faults befall it, and in the end every law is looked at."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from duopool.core.handoff.request import POISON_LIMIT

from .client import Client
from .cluster import Cluster
from .faults import Faults
from .history import History
from .laws import Laws
from .scenario import CHAOS_S, Planned, Scenario, scenario
from .transport import READ_TIMEOUT_S

POISON = "workers died one after the other"
"""How a request fails that is taken for poison."""
AUDIT_S = 0.1
"""Every worker's own check, this often."""
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
        self.cluster = Cluster(scenario)
        self.clients: list[Client] = []
        self.time, self.history, self.laws = self.cluster.time, self.cluster.history, self.cluster.laws

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
            laws.breach(f"the simulation itself failed: {_where(error)}")
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
        self.cluster.start()
        process = self.time.process("client")
        for ask in self.scenario.asks:
            client = Client(ask, process, self.cluster.network, self.scenario.routers, self.laws)
            self.clients.append(client)
            client.start()
        Faults(self.cluster, self.clients).arrange(self.scenario.plan)
        self.time.at(AUDIT_S, self._audit)

    def _all_ended(self) -> bool:
        now = self.time.now
        return now >= max(CHAOS_S, self.laws.quiet_from) and all(client.endings for client in self.clients)

    def _settle(self) -> None:
        """Everything ends by itself or by time: then nothing is held anywhere."""
        laws = self.laws
        for client in self.clients:
            if not client.endings:
                laws.breach(f"request {client.ask.params.seed} has not ended, {client.num_tokens} tokens came")
            elif client.endings[0].startswith("failed") and not self._may_fail(client):
                laws.breach(f"request {client.ask.params.seed} {client.endings[0]}: {client.details}")
        timers = self.scenario.timers
        until = self.time.now + max(timers.lease_ttl_s, timers.orphan_ttl_s, READ_TIMEOUT_S) + 3.0
        self.time.run(until, stop=lambda: bool(laws.breaches))
        if laws.breaches:
            return
        for router in self.cluster.routers.values():
            if router.pools.num_requests:
                laws.breach(f"{router.process.place} still has {router.pools.num_requests} requests")
        for place, life in self.cluster.workers.items():
            manager = life.manager
            if not life.worker.is_idle:
                laws.breach(f"{place} still holds requests, leases or reads")
            elif manager.num_available != manager.num_blocks:
                laws.breach(f"{place}: {manager.num_available} of {manager.num_blocks} blocks are free or cached")

    def _may_fail(self, client: Client) -> bool:
        """A deadline, or the poison guard: it needs workers that died, not only streams that broke."""
        if client.endings[0] == "failed: DEADLINE_EXCEEDED":
            return client.ask.timeout_s is not None
        return POISON in client.details and self.laws.num_deaths >= POISON_LIMIT

    def _audit(self) -> None:
        for place, life in self.cluster.workers.items():
            if life.process.is_alive:
                try:
                    life.watched.check()
                except AssertionError as error:
                    self.laws.breach(f"{place} is not in order: {_where(error)}")
        self.time.at(self.time.now + AUDIT_S, self._audit)


class _Errors(logging.Handler):
    """What production logs as an error is a mistake of ours."""

    def __init__(self, laws: Laws) -> None:
        super().__init__(logging.ERROR)
        self._laws = laws

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        where = "" if error is None else f": {_where(error)}"
        self._laws.breach(f"logged an error: {record.getMessage()}{where}")


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_code.co_qualname} line {trace.tb_lineno}"
    return f"{error!r}{place}"

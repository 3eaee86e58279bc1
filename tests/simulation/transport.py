"""A `BlockReader` over the simulated network: pages travel one by one, and anything may happen between two of them.

Two ways to read, as in production. Counted: P serves the read itself, between `begin_read` and `end_read`. One-sided:
P's memory is read without P having a part in it, also after P has given the pages away. Either way `done` is called
when nothing can write to the target pages any more. Verdicts are asked for by a call with a time limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import BlockId
from duopool.engine.transfer.digest import find_mismatch
from duopool.engine.transfer.source import KvSource
from duopool.engine.transfer.transport import ReadOutcome

from .model import PAGE_BYTES, Pages
from .network import Network
from .virtual_time import Process

READ_TIMEOUT_S = 0.8
CONFIRM_TIMEOUT_S = 0.5
FENCE_S = 0.05
"""Time to make sure that a transfer that was given up writes nothing any more."""
IS_FENCED = True
"""False is a planted bug: transfers that were given up go on writing."""


@dataclass(slots=True)
class Troubles:
    """What may happen to reads and verdicts now; each a probability."""

    lost_question: float = 0.0
    lost_answer: float = 0.0
    doubled_question: float = 0.0
    slow: float = 0.0
    """A page, a question or an answer takes up to `slowness_s` longer."""
    slowness_s: float = 0.0
    damaged_page: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """One life of a prefill worker, as decode workers reach it."""

    process: Process
    kv_source: KvSource
    pages: Pages


class Exchange:
    """Who serves pages at which address."""

    def __init__(self, network: Network, random: Random, *, one_sided: bool, has_digests: bool) -> None:
        self.network = network
        self.random = random
        self.troubles = Troubles()
        self.one_sided = one_sided
        self.has_digests = has_digests
        """Without digests the lease alone must tell good pages from stale ones; then no page is damaged on its way."""
        self.on_verdict: Callable[[Source, Validate, Verdict], None] = lambda source, asked, verdict: None
        self.on_read: Callable[[Process], None] = lambda process: None
        """Told which decode worker begins to read."""
        self._sources: dict[str, Source] = {}

    def listen(self, address: str, source: Source) -> None:
        self._sources[address] = source

    def source(self, address: str) -> Source | None:
        source = self._sources.get(address)
        return source if source is not None and source.process.is_alive else None

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def extra_s(self) -> float:
        troubles = self.troubles
        return troubles.slowness_s * self.random.random() if self.chance(troubles.slow) else 0.0


class SimulatedReader:
    """One decode worker's reader."""

    def __init__(self, process: Process, pages: Pages, exchange: Exchange) -> None:
        self._process = process
        self._pages = pages
        self._exchange = exchange
        self._network = exchange.network
        self._time = process.time

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        asked = ReadBlocks(
            lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, blocks=tuple(sources)
        )
        self._exchange.on_read(self._process)
        read = _Read(self, lease, asked, tuple(targets), done)
        if self._exchange.one_sided:
            read.begin_one_sided()
        else:
            read.begin_counted()

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        asked = Validate(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, release=True)
        exchange, home, place = self._exchange, self._process, lease.worker_id
        is_answered = False

        def answer(verdict: Verdict) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                done(verdict)

        def ask() -> None:
            source = exchange.source(lease.source_address)
            if source is None:
                self._later(place, home.place, lambda: answer(Verdict(ok=False, reason="nobody answers")), home)
                return

            def judge() -> None:
                verdict = source.kv_source.validate(asked)
                exchange.on_verdict(source, asked, verdict)
                if not exchange.chance(exchange.troubles.lost_answer):
                    self._later(place, home.place, lambda: answer(verdict), home)

            source.process.plan(0.0, judge)
            if exchange.chance(exchange.troubles.doubled_question):
                source.process.plan(exchange.random.random(), judge)

        if not exchange.chance(exchange.troubles.lost_question):
            self._later(home.place, place, ask, None)
        home.plan(CONFIRM_TIMEOUT_S, lambda: answer(Verdict(ok=False, reason="no verdict in time")))

    def close(self) -> None:
        pass

    def _later(self, source: str, target: str, work: Callable[[], None], process: Process | None) -> None:
        self._time.at(self._network.arrival(source, target) + self._exchange.extra_s(), work, process=process)


class _Read:
    """One read under way."""

    def __init__(
        self,
        reader: SimulatedReader,
        lease: LeaseRef,
        asked: ReadBlocks,
        targets: tuple[BlockId, ...],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        self._reader = reader
        self._exchange = reader._exchange
        self._time = reader._time
        self._home = reader._process
        self._place = lease.worker_id
        self._address = lease.source_address
        self._asked = asked
        self._targets = targets
        self._done = done
        self._is_over = False
        self._close_at_source: Callable[[], None] = lambda: None
        self._home.plan(READ_TIMEOUT_S, lambda: self._give_up("the read took too long"))

    # ---- one-sided ---------------------------------------------------------------------------------------------------

    def begin_one_sided(self) -> None:
        source = self._exchange.source(self._address)
        self._pull(source, 0)

    def _pull(self, source: Source | None, index: int) -> None:
        """Copy one page after the other, each in two halves: it may be torn."""
        if index == len(self._targets):
            self._end("")
            return
        when = self._reader._network.arrival(self._place, self._home.place) + self._exchange.extra_s()
        middle = PAGE_BYTES // 2

        def copy(begin: int, end: int) -> bool:
            if self._is_over and IS_FENCED:
                return False
            if source is None or not source.process.is_alive or self._asked.incarnation != self._incarnation(source):
                self._give_up("the source's memory is gone")
                return False
            if not self._home.is_alive:
                return False
            self._write(index, begin, bytes(source.pages.page(self._asked.blocks[index].block_id)[begin:end]))
            return True

        def second() -> None:
            if copy(middle, PAGE_BYTES):
                self._pull(source, index + 1)

        def first() -> None:
            if copy(0, middle):
                self._time.at(self._time.now + 0.0001 + self._exchange.extra_s(), second)

        self._time.at(when, first)

    def _incarnation(self, source: Source) -> int:
        return source.kv_source.describe("grpc").incarnation

    # ---- counted -----------------------------------------------------------------------------------------------------

    def begin_counted(self) -> None:
        exchange = self._exchange
        if not exchange.chance(exchange.troubles.lost_question):
            self._reader._later(self._home.place, self._place, self._arrive, None)

    def _arrive(self) -> None:
        source = self._exchange.source(self._address)
        if source is None:
            self._reader._later(self._place, self._home.place, lambda: self._end("nobody answers"), self._home)
        else:
            source.process.plan(0.0, lambda: self._serve(source))

    def _serve(self, source: Source) -> None:
        refusal = source.kv_source.begin_read(self._asked)
        if refusal:
            self._reader._later(self._place, self._home.place, lambda: self._end(refusal), self._home)
            return
        is_open = True

        def close() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                source.kv_source.end_read(self._asked.lease_id)

        self._close_at_source = lambda: self._reader._later(
            self._home.place, self._place, lambda: source.process.plan(0.0, close), None
        )

        def send(index: int) -> None:
            if not is_open:
                return
            if index == len(self._targets) or self._exchange.chance(self._exchange.troubles.lost_answer):
                close()
                return
            page = bytes(source.pages.page(self._asked.blocks[index].block_id))

            def take() -> None:
                if not self._is_over:
                    self._write(index, 0, page)
                    if index + 1 == len(self._targets):
                        self._end("")

            when = self._reader._network.arrival(self._place, self._home.place) + self._exchange.extra_s()
            self._time.at(when, take, process=self._home)
            source.process.plan(when - self._time.now, lambda: send(index + 1))

        send(0)

    # ---- both --------------------------------------------------------------------------------------------------------

    def _write(self, index: int, begin: int, data: bytes) -> None:
        if self._exchange.chance(self._exchange.troubles.damaged_page):
            data = data[:-1] + bytes([data[-1] ^ 1 << self._exchange.random.randrange(8)])
        self._reader._pages.page(self._targets[index])[begin : begin + len(data)] = data

    def _give_up(self, error: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._close_at_source()
            self._home.plan(FENCE_S, lambda: self._done(ReadOutcome(error=error)))

    def _end(self, error: str) -> None:
        """Nothing writes any more; the digests are looked at where the production readers do."""
        if self._is_over:
            return
        self._is_over = True

        def tell() -> None:
            fault = error
            if not fault and self._exchange.has_digests:
                fault = find_mismatch(self._reader._pages, self._asked.blocks, self._targets)
            num_bytes = 0 if fault else len(self._targets) * PAGE_BYTES
            self._done(ReadOutcome(error=fault, num_bytes=num_bytes))

        self._home.plan(0.0, tell)

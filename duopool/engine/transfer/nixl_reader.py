"""Reads pages one-sidedly with NIXL: out of P's memory into own pages, without P's processor having a part in it.

Life of a read, on the transfer thread:
1. The peer's description is asked for once per (worker, incarnation); without agent metadata its pages go over gRPC.
2. The transfer begins; all transfers in flight are polled in turn.
3. When it is done, the check thread compares digests and calls `done`.
4. A transfer that breaks or is late may still write. The agent is fenced: no transfer begins, healthy ones finish, then
   the agent is taken down and a fresh one made. Only then is the read over: a late one with an error, a broken one goes
   over gRPC, which knows whether the source is alive and the lease good.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from duopool.core.errors import TransferFailed
from duopool.core.messages import LeaseRef, SealedBlock, SourceDescription, Verdict
from duopool.core.types import BlockId, Incarnation, WorkerId
from duopool.engine.transfer.digest import find_mismatch
from duopool.engine.transfer.grpc_reader import GrpcReader
from duopool.engine.transfer.nixl_agent import NixlAgent, NixlPeer
from duopool.engine.transfer.page_read import PageRead, PeerId
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source_client import SourceClient, misfit
from duopool.engine.transfer.transport import ReadOutcome

SHORTEST_SLEEP_S = 50e-6
LONGEST_SLEEP_S = 1e-3
MAX_FAILURES = 2
"""After so many broken reads in a row a peer's pages go over gRPC: its memory may be out of reach for good."""

MAX_ADDRESS = 1 << 63


@dataclass(slots=True, kw_only=True, eq=False)
class _Read(PageRead):
    transfer: Any = None
    error: str = ""
    """Why the transfer is given up; it may still write until the agent is down."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Peer:
    description: SourceDescription | None = None
    connection: NixlPeer | None = None
    waiting: list[_Read] = field(default_factory=list)
    """Reads that came before the description."""
    num_failures: int = 0


class NixlReader:
    """A `BlockReader` over one NIXL agent, named after the worker and its incarnation."""

    def __init__(
        self,
        store: PageStore,
        *,
        worker_id: WorkerId,
        incarnation: Incarnation,
        client: SourceClient,
        read_timeout_s: float = 5.0,
        make_agent: Callable[[PageStore, str], NixlAgent] = NixlAgent,
    ) -> None:
        self._store = store
        self._name = f"reader-{worker_id}-{incarnation:016x}"
        self._read_timeout_s = read_timeout_s
        self._make_agent = make_agent
        self._agent: NixlAgent | None = make_agent(store, self._name)
        """None if a fresh agent could not be made: then everything goes over gRPC."""
        self._num_agents = 1
        self._client = client
        self._grpc = GrpcReader(store, read_timeout_s=read_timeout_s, client=self._client)
        self._peers: dict[PeerId, _Peer] = {}
        self._in_flight: list[_Read] = []
        self._fenced: list[_Read] = []
        self._held_back: list[_Read] = []
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="nixl-reader-check")
        self._thread = threading.Thread(target=self._run, name="nixl-reader")
        self._thread.start()

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Pull `sources` into own pages `targets`. Raises RuntimeError once closed."""
        read = _Read.of(lease, attempt, sources, targets, done, timeout_s=self._read_timeout_s)
        with self._wake:
            if self._closed:
                raise RuntimeError("the reader is closed")
            self._inbox.append(lambda: self._begin(read))
            self._wake.notify()

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        """Ask for P's verdict, releasing the lease if it is good. Raises RuntimeError once closed."""
        self._grpc.confirm(lease, attempt, done)

    def close(self) -> None:
        """End all reads (their `done` gets an error), the agent and the threads."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._checks.shutdown(wait=True)
        self._grpc.close()

    # ---- transfer thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        sleep_s = SHORTEST_SLEEP_S
        try:
            while not self._closed:
                with self._wake:
                    if not self._inbox and not self._closed:
                        self._wake.wait(sleep_s if self._in_flight else None)
                    work, self._inbox = self._inbox, []
                for step in work:
                    step()
                progress = self._poll()
                sleep_s = SHORTEST_SLEEP_S if work or progress else min(2 * sleep_s, LONGEST_SLEEP_S)
                while self._fenced and not self._in_flight:  # what was held back may be refused in its turn
                    self._replace_agent()
        finally:  # closed, or a bug: no read may wait forever
            self._end()

    def _begin(self, read: _Read) -> None:
        if self._closed:
            self._finish(read, "the reader is closed")
        elif self._fenced:
            self._held_back.append(read)
        elif read.peer_id not in self._peers:
            self._introduce(read)
        else:
            self._begin_with(self._peers[read.peer_id], read)

    def _introduce(self, read: _Read) -> None:
        """Ask a new peer how it can be read; an earlier life of the same worker is forgotten."""
        for peer_id in [known for known in self._peers if known[0] == read.lease.worker_id]:
            if not any(other.peer_id == peer_id for other in self._in_flight):
                self._forget(peer_id)
        peer = self._peers[read.peer_id] = _Peer(waiting=[read])

        def described(answer: SourceDescription | str) -> None:
            with self._wake:
                self._inbox.append(lambda: self._described(read.peer_id, peer, answer))
                self._wake.notify()

        try:
            self._client.describe(read.lease.source_address, "nixl", described)
        except RuntimeError as closed:
            described(str(closed))

    def _described(self, peer_id: PeerId, peer: _Peer, answer: SourceDescription | str) -> None:
        waiting, peer.waiting = peer.waiting, []
        fault = answer if isinstance(answer, str) else self._misfit(peer_id, answer)
        if not isinstance(answer, str):
            peer.description = answer
        if fault and self._peers.get(peer_id) is peer:
            del self._peers[peer_id]
        for read in waiting:
            if fault:
                self._finish(read, fault)
            else:
                self._begin(read)

    def _misfit(self, peer_id: PeerId, description: SourceDescription) -> str:
        num_blocks, begin = description.num_blocks, description.base_address
        fault = misfit(description, peer_id, self._store)
        if not fault and not 0 <= begin <= MAX_ADDRESS - num_blocks * self._store.page_bytes:
            return f"{num_blocks} pages at {begin:#x} cannot be"
        return fault

    def _begin_with(self, peer: _Peer, read: _Read) -> None:
        description = peer.description
        if description is None:
            peer.waiting.append(read)
            return
        if self._agent is None or not description.agent_metadata or peer.num_failures >= MAX_FAILURES:
            self._read_over_grpc(read)
            return
        if any(not 0 <= block.block_id < description.num_blocks for block in read.sources):
            self._finish(read, f"a block is outside the source's store of {description.num_blocks}")
            return
        if not read.sources:
            self._finish(read, "")
            return
        try:
            if peer.connection is None:
                peer.connection = self._agent.connect(description)
        except TransferFailed:
            self._forget(read.peer_id)
            self._read_over_grpc(read)
            return
        try:
            sources = [block.block_id for block in read.sources]
            read.transfer = self._agent.begin(peer.connection, sources, read.targets)
            self._in_flight.append(read)
        except TransferFailed as failure:
            self._fence(read, str(failure))

    def _poll(self) -> bool:
        """Look at every transfer in flight; True if one came to its end."""
        now, before = time.monotonic(), len(self._in_flight)
        for read in tuple(self._in_flight):
            try:
                if self._agent is not None and self._agent.is_done(read.transfer):
                    self._in_flight.remove(read)
                    self._arrived(read)
                elif now >= read.late_at:
                    self._in_flight.remove(read)
                    self._fence(read, f"the read took longer than {self._read_timeout_s:.1f} s")
            except TransferFailed as failure:
                self._in_flight.remove(read)
                self._fence(read, str(failure))
        return len(self._in_flight) != before

    def _arrived(self, read: _Read) -> None:
        peer = self._peers.get(read.peer_id)
        if peer is not None:
            peer.num_failures = 0

        def check() -> None:
            fault = find_mismatch(self._store, read.sources, read.targets)
            num_bytes = 0 if fault else len(read.targets) * self._store.page_bytes
            read.done(ReadOutcome(error=fault, is_damaged=bool(fault), num_bytes=num_bytes))

        self._checks.submit(check)

    def _fence(self, read: _Read, error: str) -> None:
        read.error = error
        self._fenced.append(read)
        peer = self._peers.get(read.peer_id)
        if peer is not None:
            peer.num_failures += 1

    def _replace_agent(self) -> None:
        """Nothing healthy is in flight: end what may still write, then go on with a fresh agent."""
        self._take_agent_down()
        self._num_agents += 1
        with contextlib.suppress(TransferFailed):
            self._agent = self._make_agent(self._store, f"{self._name}-{self._num_agents}")
        fenced, self._fenced = self._fenced, []
        held_back, self._held_back = self._held_back, []
        for read in fenced:
            if time.monotonic() >= read.late_at:
                self._finish(read, read.error)
            else:
                self._read_over_grpc(read)
        for read in held_back:
            self._begin(read)

    def _take_agent_down(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        for read in (*self._in_flight, *self._fenced):
            read.transfer = None
        for peer in self._peers.values():
            peer.connection = None

    def _forget(self, peer_id: PeerId) -> None:
        peer = self._peers.pop(peer_id)
        for read in peer.waiting:
            self._finish(read, "the source was replaced")
        if peer.connection is not None and self._agent is not None:
            self._agent.disconnect(peer.connection)

    def _read_over_grpc(self, read: _Read) -> None:
        try:
            self._grpc.read(read.lease, read.attempt, read.sources, read.targets, read.done)
        except RuntimeError as closed:
            self._finish(read, str(closed))

    def _finish(self, read: _Read, error: str) -> None:
        self._checks.submit(lambda: read.done(ReadOutcome(error=error)))

    def _end(self) -> None:
        with self._wake:
            self._closed = True
            work, self._inbox = self._inbox, []
        self._take_agent_down()
        reads = [*self._in_flight, *self._fenced, *self._held_back]
        self._in_flight, self._fenced, self._held_back = [], [], []
        for peer in self._peers.values():
            reads += peer.waiting
            peer.waiting = []
        for read in reads:
            self._finish(read, "the reader is closed")
        for step in work:
            step()  # reads that were never begun end with an error

"""What stands in for workers in the transfer tests: a page store, a lease keeper, and sources over every transport."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from grpc import aio

from duopool.core.handoff import lease as leases
from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from duopool.engine import shared_memory
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import make_nixl_source
from duopool.engine.transfer.grpc_source import add_kv_source
from duopool.engine.transfer.in_process import InProcessNetwork
from duopool.engine.transfer.source import KvSource, RemoteReadable
from duopool.proto.codec import INTERNAL_SERVER_OPTIONS

NOW = 100.0


class FakeStore:
    """Pages in a numpy array, filled with noise; other processes may map them."""

    def __init__(
        self, *, num_blocks: int = 32, page_bytes: int = 4096 + 64, seed: int = 0, digest: str = "layout"
    ) -> None:
        allocated = shared_memory.allocate(num_blocks * page_bytes)
        memory, self.shared_memory = allocated or (bytearray(num_blocks * page_bytes), None)
        self.pages = np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, page_bytes)
        self.pages[:] = np.random.default_rng(seed).integers(0, 256, self.pages.shape, dtype=np.uint8)
        self.num_blocks = num_blocks
        self.page_bytes = page_bytes
        self.digest = digest

    @property
    def base_address(self) -> int:
        return int(self.pages.ctypes.data)

    def page(self, block_id: BlockId) -> memoryview:
        return memoryview(self.pages[block_id])


class FakeKeeper:
    """Leases by the real transitions, under a clock that stands still unless a test moves it."""

    def __init__(self, *, num_blocks: int) -> None:
        self.now = NOW
        self.generations = [1] * num_blocks
        self.leases: dict[LeaseId, leases.Lease] = {}
        self.num_reads_begun = 0
        self._lock = threading.Lock()

    def promise(self, lease_id: LeaseId, attempt: int, blocks: tuple[SealedBlock, ...]) -> None:
        self.leases[lease_id] = leases.Lease(
            lease_id=lease_id, request_id=RequestId("r"), attempt=attempt, blocks=blocks, expires_at=self.now + 5
        )

    def begin_read(self, read: ReadBlocks) -> str:
        with self._lock:
            lease = self.leases.get(read.lease_id)
            refusal = leases.refusal(lease, attempt=read.attempt, now=self.now)
            if refusal or lease is None:
                return refusal
            if not set(read.blocks) <= set(lease.blocks):
                return "not in the lease"
            self.leases[read.lease_id] = leases.begin_read(lease)
            self.num_reads_begun += 1
            return ""

    def end_read(self, lease_id: LeaseId) -> None:
        with self._lock:
            self.leases[lease_id] = leases.end_read(self.leases[lease_id])

    def validate(self, validate: Validate) -> Verdict:
        with self._lock:
            lease = self.leases.get(validate.lease_id)
            refusal = leases.refusal(lease, attempt=validate.attempt, now=self.now)
            if refusal or lease is None:
                return Verdict(ok=False, reason=refusal)
            if any(self.generations[block.block_id] != block.generation for block in lease.blocks):
                return Verdict(ok=False, reason="a block was allocated again")
            if validate.release:
                self.leases[validate.lease_id] = leases.revoke(lease)
            return Verdict(ok=True)

    @property
    def num_readers(self) -> int:
        return sum(lease.num_readers for lease in self.leases.values())


@dataclass
class FakeSource:
    """One prefill worker's KV source, reachable at `address`."""

    worker_id: WorkerId
    incarnation: Incarnation
    address: str
    store: FakeStore
    keeper: FakeKeeper
    stop: Callable[[], None] = field(repr=False)

    def lease(
        self, lease_id: int, block_ids: list[int], *, attempt: int = 1, incarnation: int | None = None
    ) -> tuple[LeaseRef, tuple[SealedBlock, ...]]:
        ids = [BlockId(block_id) for block_id in block_ids]
        blocks = seal(self.store, ids, [self.keeper.generations[block_id] for block_id in ids])
        self.keeper.promise(LeaseId(lease_id), attempt, blocks)
        return self.ref(lease_id, incarnation=incarnation), blocks

    def ref(self, lease_id: int, *, incarnation: int | None = None) -> LeaseRef:
        return LeaseRef(
            lease_id=LeaseId(lease_id),
            worker_id=self.worker_id,
            incarnation=self.incarnation if incarnation is None else Incarnation(incarnation),
            source_address=self.address,
        )


def start_source(
    transport: str,
    network: InProcessNetwork,
    *,
    worker_id: str = "prefill-0",
    incarnation: int = 7,
    store: FakeStore | None = None,
    address: str = "127.0.0.1:0",
    nixl: RemoteReadable | None = None,
) -> FakeSource:
    """A live source; for `nixl` and `grpc` it is a gRPC server on a thread of its own."""
    store = FakeStore(seed=incarnation) if store is None else store
    keeper = FakeKeeper(num_blocks=store.num_blocks)
    worker, life = WorkerId(worker_id), Incarnation(incarnation)
    if transport == "in_process":
        address = address.replace(":0", f":{incarnation}")
        network.listen(address, KvSource(keeper=keeper, store=store, incarnation=life))
        return FakeSource(worker, life, address, store, keeper, stop=lambda: network.hang_up(address))
    agent = make_nixl_source(transport, store, worker_id=worker, incarnation=life)
    started: threading.Event = threading.Event()
    ports: list[int] = []
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        server = aio.server(options=INTERNAL_SERVER_OPTIONS)
        add_kv_source(server, keeper=keeper, store=store, incarnation=life, nixl=agent or nixl)
        ports.append(server.add_insecure_port(address))
        await server.start()
        started.set()
        await ended.wait()
        await server.stop(None)
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls, timeout=1)  # cancelled ones end here, not with the interpreter

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="fake-source")
    thread.start()
    assert started.wait(20)

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(ended.set)
            thread.join(20)
            loop.close()
            if agent is not None:
                agent.close()

    return FakeSource(worker, life, f"127.0.0.1:{ports[0]}", store, keeper, stop=stop)

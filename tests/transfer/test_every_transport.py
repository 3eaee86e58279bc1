"""The same laws for every transport: pages arrive bit for bit, or the read ends with an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from transfer_fakes import FakeSource, FakeStore, start_source

from duopool.core.messages import LeaseRef, SealedBlock, Verdict
from duopool.core.types import BlockId
from duopool.engine.transfer.factory import available_transports, make_reader
from duopool.engine.transfer.in_process import InProcessNetwork, InProcessReader
from duopool.engine.transfer.transport import BlockReader, ReadOutcome

PATIENCE_S = 60.0


class Bed:
    """One decode worker and as many prefill workers as a test starts."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.store = FakeStore(seed=99)
        self.network = InProcessNetwork()
        self.reader: BlockReader = (
            InProcessReader(self.store, self.network)
            if transport == "in_process"
            else make_reader(transport, self.store, worker_id="decode-0", incarnation=1)
        )
        self.sources: list[FakeSource] = []

    def source(self, **options: object) -> FakeSource:
        source = start_source(self.transport, self.network, **options)  # type: ignore[arg-type]
        self.sources.append(source)
        return source

    def begin(
        self, lease: LeaseRef, blocks: tuple[SealedBlock, ...], targets: list[int], *, attempt: int = 1
    ) -> Future[ReadOutcome]:
        outcome: Future[ReadOutcome] = Future()
        self.reader.read(lease, attempt, blocks, [BlockId(target) for target in targets], outcome.set_result)
        return outcome

    def read(
        self, lease: LeaseRef, blocks: tuple[SealedBlock, ...], targets: list[int], *, attempt: int = 1
    ) -> ReadOutcome:
        return self.begin(lease, blocks, targets, attempt=attempt).result(PATIENCE_S)

    def confirm(self, lease: LeaseRef, *, attempt: int = 1) -> Verdict:
        verdict: Future[Verdict] = Future()
        self.reader.confirm(lease, attempt, verdict.set_result)
        return verdict.result(PATIENCE_S)

    def close(self) -> None:
        self.reader.close()
        for source in self.sources:
            source.stop()


@pytest.fixture(params=["in_process", "grpc", "nixl", "shared_memory", "auto"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    if request.param not in ("in_process", "auto", *available_transports()):
        pytest.skip(f"{request.param} is not installed")
    bed = Bed(request.param)
    yield bed
    bed.close()
    assert all(source.keeper.num_readers == 0 for source in bed.sources)


def test_scattered_pages_arrive_exactly_and_nothing_else_changes(bed: Bed) -> None:
    source = bed.source()
    random = np.random.default_rng(3)
    for lease_id in range(1, 6):
        num_pages = int(random.integers(1, 20))
        block_ids = random.permutation(source.store.num_blocks)[:num_pages].tolist()
        targets = random.permutation(bed.store.num_blocks)[:num_pages].tolist()
        expected = bed.store.pages.copy()
        expected[targets] = source.store.pages[block_ids]
        lease, blocks = source.lease(lease_id, block_ids)
        outcome = bed.read(lease, blocks, targets)
        assert outcome == ReadOutcome(num_bytes=num_pages * bed.store.page_bytes)
        np.testing.assert_array_equal(bed.store.pages, expected)


def test_a_confirmed_lease_is_released(bed: Bed) -> None:
    source = bed.source()
    lease, blocks = source.lease(1, [4, 2])
    assert not bed.read(lease, blocks, [0, 1]).error
    assert bed.confirm(lease).ok
    assert source.keeper.leases[lease.lease_id].revoked
    assert not bed.confirm(lease).ok


def test_a_wrong_digest_is_an_error(bed: Bed) -> None:
    source = bed.source()
    lease, blocks = source.lease(1, [4, 2, 9])
    source.store.pages[2, 17] ^= 1
    assert "digest" in bed.read(lease, blocks, [0, 1, 2]).error


def wrong_lease(source: FakeSource) -> tuple[LeaseRef, int]:
    return source.ref(55), 1


def wrong_attempt(source: FakeSource) -> tuple[LeaseRef, int]:
    return source.ref(1), 2


def wrong_incarnation(source: FakeSource) -> tuple[LeaseRef, int]:
    return source.ref(1, incarnation=8), 1


def lease_out_of_time(source: FakeSource) -> tuple[LeaseRef, int]:
    source.keeper.now += 6
    return source.ref(1), 1


def block_allocated_again(source: FakeSource) -> tuple[LeaseRef, int]:
    source.keeper.generations[2] += 1
    return source.ref(1), 1


@pytest.mark.parametrize(
    "fault", [wrong_lease, wrong_attempt, wrong_incarnation, lease_out_of_time, block_allocated_again]
)
def test_no_fault_ends_in_a_good_verdict(bed: Bed, fault: Callable[[FakeSource], tuple[LeaseRef, int]]) -> None:
    """A transport may or may not refuse the read, as one-sided reads are not seen by P; the verdict always does."""
    source = bed.source()
    _, blocks = source.lease(1, [4, 2])
    lease, attempt = fault(source)
    outcome = bed.read(lease, blocks, [0, 1], attempt=attempt)
    if bed.transport in ("in_process", "grpc") and fault is not block_allocated_again:
        assert outcome.error
    assert not bed.confirm(lease, attempt=attempt).ok


def test_blocks_outside_the_lease_are_refused_or_damaged(bed: Bed) -> None:
    source = bed.source()
    lease, _ = source.lease(1, [4, 2])
    out_of_range = (SealedBlock(BlockId(source.store.num_blocks), 1, 0),)
    assert bed.read(lease, out_of_range, [0]).error
    assert bed.read(lease, (SealedBlock(BlockId(5), 1, 12345),), [0]).error


def test_another_layout_is_refused(bed: Bed) -> None:
    source = bed.source(store=FakeStore(digest="another layout"))
    lease, blocks = source.lease(1, [4, 2])
    before = bed.store.pages.copy()
    assert "layout" in bed.read(lease, blocks, [0, 1]).error
    np.testing.assert_array_equal(bed.store.pages, before)


def test_a_dead_source_gives_errors_and_no_verdict(bed: Bed) -> None:
    source = bed.source()
    lease, blocks = source.lease(1, [4, 2])
    source.stop()
    assert bed.read(lease, blocks, [0, 1]).error
    verdict = bed.confirm(lease)
    assert not verdict.ok
    assert verdict.reason


def test_a_restarted_source_is_read_again_and_its_old_leases_are_not(bed: Bed) -> None:
    first = bed.source(incarnation=7)
    old_lease, old_blocks = first.lease(1, [4, 2])
    assert not bed.read(old_lease, old_blocks, [0, 1]).error
    first.stop()
    bed.read(old_lease, old_blocks, [0, 1])  # may find the connection gone; must only end
    second = bed.source(incarnation=8, address=first.address)
    assert not bed.confirm(old_lease).ok
    lease, blocks = second.lease(1, [9, 3, 5])
    assert not bed.read(lease, blocks, [6, 0, 2]).error
    np.testing.assert_array_equal(bed.store.pages[[6, 0, 2]], second.store.pages[[9, 3, 5]])
    assert bed.confirm(lease).ok


def test_many_reads_at_once_from_two_sources(bed: Bed) -> None:
    sources = [bed.source(worker_id=f"prefill-{n}", incarnation=20 + n) for n in range(2)]
    expected = bed.store.pages.copy()
    outcomes = []
    for target in range(bed.store.num_blocks):
        source, block_id = sources[target % 2], (target * 7) % bed.store.num_blocks
        expected[target] = source.store.pages[block_id]
        lease, blocks = source.lease(target, [block_id])
        outcomes.append(bed.begin(lease, blocks, [target]))
    assert [outcome.result(PATIENCE_S).error for outcome in outcomes] == [""] * bed.store.num_blocks
    np.testing.assert_array_equal(bed.store.pages, expected)


def test_closing_ends_every_read_and_every_thread(bed: Bed) -> None:
    source = bed.source()
    before = set(threading.enumerate())
    lease, blocks = source.lease(1, list(range(20)))
    outcomes = [bed.begin(lease, blocks, list(range(20))) for _ in range(8)]
    bed.reader.close()
    assert all(outcome.done() for outcome in outcomes)
    left = [thread for thread in threading.enumerate() if thread not in before and "reader" in thread.name]
    assert left == []
    with pytest.raises(RuntimeError, match="closed"):
        bed.begin(lease, blocks, list(range(20)))
    source.stop()

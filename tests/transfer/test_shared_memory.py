"""Reading out of mapped memory: what is refused and goes over gRPC instead, and what is let go when its owner ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from transfer_fakes import FakeSource, FakeStore, start_source

from duopool.core.messages import SharedMemory
from duopool.core.types import BlockId
from duopool.engine import shared_memory
from duopool.engine.transfer.factory import available_transports
from duopool.engine.transfer.in_process import InProcessNetwork
from duopool.engine.transfer.transport import ReadOutcome
from duopool.kernels import ops

if "shared_memory" not in available_transports():
    pytest.skip("memory is shared on Linux only", allow_module_level=True)

from duopool.engine.transfer import shared_memory_reader
from duopool.engine.transfer.grpc_reader import GrpcReader
from duopool.engine.transfer.shared_memory_reader import SharedMemoryReader
from duopool.engine.transfer.source_client import SourceClient

PATIENCE_S = 30.0
OTHER_USER = 65534


class Bed:
    def __init__(self, *, read_timeout_s: float = 5.0) -> None:
        self.source = start_source("shared_memory", InProcessNetwork())
        self.store = FakeStore(seed=99)
        self.num_copies = 0
        self.on_copy: Callable[[], None] = lambda: None
        client = SourceClient(confirm_timeout_s=2.0)
        self.reader = SharedMemoryReader(
            self.store,
            client=client,
            others=GrpcReader(self.store, client=client),
            read_timeout_s=read_timeout_s,
            copy_pages=self._copy_pages,
        )

    def _copy_pages(self, *args: object, **options: object) -> list[int]:
        self.num_copies += 1
        self.on_copy()
        return ops.copy_pages(*args, **options)  # type: ignore[arg-type]

    def begin(self, block_ids: list[int], targets: list[int], *, lease_id: int = 1) -> Future[ReadOutcome]:
        lease, blocks = self.source.lease(lease_id, block_ids)
        outcome: Future[ReadOutcome] = Future()
        self.reader.read(lease, 1, blocks, [BlockId(target) for target in targets], outcome.set_result)
        return outcome

    def close(self) -> None:
        self.reader.close()
        self.source.stop()


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.close()


def of_nobody(source: FakeSource) -> SharedMemory | None:
    return None


def of_no_process(source: FakeSource) -> SharedMemory | None:
    return SharedMemory(pid=2**60, file=3, name="x")


def of_another_name(source: FakeSource) -> SharedMemory | None:
    """As after the owner's process number was given to another process, or on another host."""
    mine = source.store.shared_memory
    assert mine is not None
    return SharedMemory(pid=mine.pid, file=mine.file, name="duopool-of-another")


def of_another_file(source: FakeSource) -> SharedMemory | None:
    return SharedMemory(pid=os.getpid(), file=0, name="duopool-stdin")


def unsealed(source: FakeSource) -> SharedMemory | None:
    """Could be cut while it is read, which would end the reader's process."""
    file = os.memfd_create("duopool-unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, source.store.num_blocks * source.store.page_bytes)
    source.held = file  # type: ignore[attr-defined]
    return SharedMemory(pid=os.getpid(), file=file, name="duopool-unsealed")


def too_short(source: FakeSource) -> SharedMemory | None:
    short = shared_memory.allocate(source.store.page_bytes)
    assert short is not None
    source.held, where = short  # type: ignore[attr-defined]
    return where


@pytest.mark.parametrize(
    "claim", [of_nobody, of_no_process, of_another_name, of_another_file, unsealed, too_short], ids=lambda f: f.__name__
)
def test_memory_that_is_not_what_it_is_said_to_be_is_left_to_grpc(
    bed: Bed, claim: Callable[[FakeSource], SharedMemory | None]
) -> None:
    bed.source.store.shared_memory = claim(bed.source)
    for lease_id in (1, 2):
        assert bed.begin([4, 2], [0, 1], lease_id=lease_id).result(PATIENCE_S).error == ""
        np.testing.assert_array_equal(bed.store.pages[[0, 1]], bed.source.store.pages[[4, 2]])
        assert bed.source.keeper.num_reads_begun == lease_id
    assert bed.num_copies == 0
    if isinstance(held := getattr(bed.source, "held", None), int):
        os.close(held)


def test_memory_that_the_kernel_refuses_is_left_to_grpc(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: SharedMemory, num_bytes: int) -> None:
        raise PermissionError("as in another container")

    monkeypatch.setattr(shared_memory_reader, "attach", refuse)
    assert bed.begin([4], [0]).result(PATIENCE_S).error == ""
    assert (bed.source.keeper.num_reads_begun, bed.num_copies) == (1, 0)


def test_another_users_memory_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from duopool.engine import shared_memory; memory, at = shared_memory.allocate(5000)\n"
            "print(at.pid, at.file, at.name, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert owner.stdout is not None
        pid, file, name = owner.stdout.readline().split()
        memory = SharedMemory(pid=int(pid), file=int(file), name=name)
        shared_memory.attach(memory, 5000).close()
        os.seteuid(OTHER_USER)
        try:
            with pytest.raises(PermissionError):
                shared_memory.attach(memory, 5000)
        finally:
            os.seteuid(0)
    finally:
        owner.communicate("\n", timeout=PATIENCE_S)


def test_nobody_can_cut_shared_memory_or_write_into_it() -> None:
    allocated = shared_memory.allocate(3 << 20)
    assert allocated is not None
    array, memory = allocated
    path = f"/proc/{memory.pid}/fd/{memory.file}"
    with open(path, "r+b", buffering=0) as file:
        with pytest.raises(PermissionError):
            file.truncate(1)
        with pytest.raises(PermissionError):
            file.write(b"x")
    assert not any(memoryview(array).cast("B"))
    del allocated, array
    assert not os.path.exists(path) or memory.name not in os.readlink(path)


@pytest.mark.parametrize("fault", ["bit flip", "swapped", "rewritten"])
def test_damage_is_seen(bed: Bed, fault: str) -> None:
    pages = bed.source.store.pages
    lease, blocks = bed.source.lease(1, [4, 2, 9])
    if fault == "bit flip":
        pages[2, -1] ^= 1
    elif fault == "swapped":
        pages[[4, 9]] = pages[[9, 4]]
    else:
        pages[9] = 5
    outcome: Future[ReadOutcome] = Future()
    bed.reader.read(lease, 1, blocks, [BlockId(0), BlockId(1), BlockId(2)], outcome.set_result)
    assert outcome.result(PATIENCE_S).is_damaged


def test_a_late_read_ends_with_an_error_and_writes_nothing() -> None:
    bed = Bed(read_timeout_s=0.0)
    try:
        before = bed.store.pages.copy()
        assert "took longer" in bed.begin([4], [0]).result(PATIENCE_S).error
        np.testing.assert_array_equal(bed.store.pages, before)
    finally:
        bed.close()


def test_a_long_read_is_cut_and_closing_waits_for_one_piece_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory_reader, "COPY_BYTES", 3 * FakeStore(num_blocks=1).page_bytes)
    bed = Bed()
    assert bed.begin(list(range(20)), list(range(20))).result(PATIENCE_S).error == ""
    np.testing.assert_array_equal(bed.store.pages[:20], bed.source.store.pages[:20])
    assert bed.num_copies == 7
    copying, is_closed = threading.Event(), threading.Event()
    bed.on_copy = lambda: (copying.set(), is_closed.wait(PATIENCE_S))  # type: ignore[func-returns-value]
    cut, waiting = (bed.begin(list(range(20)), list(range(20)), lease_id=n) for n in (2, 3))
    assert copying.wait(PATIENCE_S)
    closing = threading.Thread(target=bed.close)
    closing.start()
    while not bed.reader._closed:
        copying.wait(0.001)
    is_closed.set()
    closing.join(PATIENCE_S)
    assert "closed" in cut.result(0).error
    assert "closed" in waiting.result(0).error
    assert bed.num_copies == 8

"""Transfers between real processes, one of which may hang or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from transfer_fakes import FakeStore

from duopool.core.config import TransportName
from duopool.core.messages import LeaseRef, SealedBlock, Verdict
from duopool.core.types import BlockId, Incarnation, LeaseId, WorkerId
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import available_transports, make_reader
from duopool.engine.transfer.transport import BlockReader, ReadOutcome

PATIENCE_S = 60.0
INCARNATION = 7
SOURCE_STORE = FakeStore(seed=INCARNATION)
"""What the other process holds."""


class SourceProcess:
    def __init__(self, transport: str, **environment: str) -> None:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here.parents[1]), str(here)])
        self.process = subprocess.Popen(
            [sys.executable, str(here / "source_process.py"), transport, str(INCARNATION)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )
        assert self.process.stdout is not None
        address = self.process.stdout.readline().strip()
        self.lease = LeaseRef(
            lease_id=LeaseId(1),
            worker_id=WorkerId("prefill-0"),
            incarnation=Incarnation(INCARNATION),
            source_address=address,
        )

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., SourceProcess]]:
    processes = []

    def begin(transport: str, **environment: str) -> SourceProcess:
        processes.append(SourceProcess(transport, **environment))
        return processes[-1]

    yield begin
    for process in processes:
        process.end()


def blocks(block_ids: list[int]) -> tuple[SealedBlock, ...]:
    return seal(SOURCE_STORE, [BlockId(block_id) for block_id in block_ids], [1] * len(block_ids))


def read(reader: BlockReader, lease: LeaseRef, block_ids: list[int], targets: list[int]) -> ReadOutcome:
    outcome: Future[ReadOutcome] = Future()
    reader.read(lease, 1, blocks(block_ids), [BlockId(target) for target in targets], outcome.set_result)
    return outcome.result(PATIENCE_S)


def skip_without(transport: str) -> None:
    if transport not in ("auto", *available_transports()):
        pytest.skip(f"{transport} is not installed")


@pytest.mark.parametrize(
    ("transport", "environment"),
    [("grpc", {}), ("nixl", {}), ("nixl", {"UCX_TLS": "tcp,self"}), ("shared_memory", {}), ("auto", {})],
    ids=["grpc", "nixl", "nixl with memory out of reach", "shared memory", "auto"],
)
def test_pages_cross_processes_until_the_source_dies(
    start: Callable[..., SourceProcess], transport: str, environment: dict[str, str]
) -> None:
    skip_without(transport)
    source, store = start(transport, **environment), FakeStore(seed=99)
    expected = store.pages.copy()
    reader = make_reader(transport, store, worker_id=WorkerId("decode-0"), incarnation=Incarnation(1))
    try:
        for shift in range(4):
            block_ids, targets = [5, 31, 0, 17], [9 + shift, 2, 30, 20 - shift]
            expected[targets] = SOURCE_STORE.pages[block_ids]
            assert read(reader, source.lease, block_ids, targets).error == ""
            np.testing.assert_array_equal(store.pages, expected)
        source.process.kill()
        source.process.wait()
        assert read(reader, source.lease, [1, 2], [0, 1]).error
    finally:
        reader.close()


@pytest.mark.parametrize("transport", ["shared_memory", "auto"])
def test_a_source_that_dies_while_it_is_read_leaves_right_pages_or_errors_and_no_memory(
    start: Callable[..., SourceProcess], transport: TransportName
) -> None:
    skip_without("shared_memory")
    source, store = start(transport), FakeStore(seed=99)
    reader = make_reader(transport, store, worker_id=WorkerId("decode-0"), incarnation=Incarnation(1))
    ids = [BlockId(block_id) for block_id in range(store.num_blocks)]
    begun: list[Future[ReadOutcome]] = []
    try:
        assert read(reader, source.lease, [0], [0]).error == ""
        assert "duopool" in own_mappings()
        for number in range(400):
            begun.append(Future())
            reader.read(source.lease, 1, blocks(ids), ids, begun[-1].set_result)
            if number == 200:
                source.process.kill()
        source.process.wait()
        outcomes = [outcome.result(PATIENCE_S) for outcome in begun]
        assert not any(outcome.is_damaged for outcome in outcomes)
        assert not outcomes[0].error
        np.testing.assert_array_equal(store.pages, SOURCE_STORE.pages)
        assert read(reader, source.lease, [1], [0]).error
        assert "duopool" not in own_mappings()
    finally:
        reader.close()


def own_mappings() -> str:
    """What this process has mapped to read only, of memory that is shared."""
    return "".join(line for line in Path("/proc/self/maps").read_text().splitlines() if " r--s " in line)


@pytest.mark.parametrize("transport", ["nixl", "shared_memory"])
def test_a_stopped_source_gives_no_verdict(start: Callable[..., SourceProcess], transport: TransportName) -> None:
    """One-sided reads need nothing of the source's process; whether they count does."""
    skip_without(transport)
    source, store = start(transport), FakeStore(seed=99)
    reader = make_reader(
        transport, store, worker_id=WorkerId("decode-0"), incarnation=Incarnation(1), confirm_timeout_s=0.3
    )
    try:
        assert read(reader, source.lease, [5], [1]).error == ""
        source.process.send_signal(signal.SIGSTOP)
        os.waitpid(source.process.pid, os.WUNTRACED)  # returns when it has stopped
        verdict: Future[Verdict] = Future()
        reader.confirm(source.lease, 1, verdict.set_result)
        assert "DEADLINE_EXCEEDED" in verdict.result(PATIENCE_S).reason
        source.process.send_signal(signal.SIGCONT)
        assert read(reader, source.lease, [6], [0]).error == ""
        np.testing.assert_array_equal(store.pages[0], SOURCE_STORE.pages[6])
    finally:
        reader.close()

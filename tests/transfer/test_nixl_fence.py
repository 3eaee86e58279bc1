"""What the NIXL reader does with transfers that break or hang, with an agent that does as the test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import numpy as np
import pytest
import torch
from transfer_fakes import FakeSource, FakeStore, start_source

from duopool.core.errors import TransferFailed
from duopool.core.messages import SourceDescription
from duopool.core.types import BlockId, Incarnation, WorkerId
from duopool.engine.kv_layout import KVLayout, LayerShape
from duopool.engine.kv_store import KVStore
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.in_process import InProcessNetwork
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.transport import ReadOutcome

pytest.importorskip("grpc")
from duopool.engine.transfer.nixl_reader import NixlReader
from duopool.engine.transfer.source_client import SourceClient

PATIENCE_S = 30.0


class Script:
    """How transfers go, by the target of their first page; everything the agents do is noted."""

    def __init__(self) -> None:
        self.hanging: set[int] = set()
        self.breaking: set[int] = set()
        self.refused: set[int] = set()
        self.source: FakeSource | None = None
        self.num_begun = 0
        self.has_begun = threading.Event()
        self.num_agents = 0
        self.log: list[str] = []


class FakeAgent:
    script: Script

    def __init__(self, store: PageStore, name: str) -> None:
        self.store = store
        self.script.num_agents += 1
        self.script.log.append("agent up")

    def connect(self, description: SourceDescription) -> Any:
        return object()

    def disconnect(self, peer: Any) -> None:
        pass

    def begin(self, peer: Any, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> Any:
        self.script.num_begun += 1
        self.script.has_begun.set()
        if targets[0] in self.script.refused:
            raise TransferFailed("the read could not begin")
        return tuple(sources), tuple(targets)

    def is_done(self, transfer: Any) -> bool:
        sources, targets = transfer
        if targets[0] in self.script.breaking:
            raise TransferFailed("the read broke")
        if targets[0] in self.script.hanging:
            return False
        assert self.script.source is not None
        for source, target in zip(sources, targets, strict=True):
            self.store.page(target)[:] = self.script.source.store.page(source)
        return True

    def close(self) -> None:
        self.script.log.append("agent down")


class Metadata:
    agent_metadata = b"fake"


@pytest.fixture
def bed() -> Iterator[tuple[Script, FakeSource, FakeStore, NixlReader]]:
    script = Script()
    agent = type("Agent", (FakeAgent,), {"script": script})
    source = start_source("grpc", InProcessNetwork(), nixl=Metadata())
    script.source = source
    store = FakeStore(seed=99)
    reader = NixlReader(
        store,
        worker_id=WorkerId("decode-0"),
        incarnation=Incarnation(1),
        client=SourceClient(confirm_timeout_s=2.0),
        read_timeout_s=0.3,
        make_agent=agent,
    )
    yield script, source, store, reader
    reader.close()
    source.stop()
    assert script.log.count("agent up") == script.log.count("agent down")


Bed = tuple[Script, FakeSource, FakeStore, NixlReader]


def begin(bed: Bed, lease_id: int, block_ids: list[int], targets: list[int]) -> Future[ReadOutcome]:
    script, source, _, reader = bed
    lease, blocks = source.lease(lease_id, block_ids)
    outcome: Future[ReadOutcome] = Future()

    def done(ended: ReadOutcome) -> None:
        script.log.append(f"done {targets[0]}")
        outcome.set_result(ended)

    reader.read(lease, 1, blocks, [BlockId(target) for target in targets], done)
    return outcome


def test_a_hanging_read_ends_only_after_its_agent(bed: Bed) -> None:
    script, _, _, _ = bed
    script.hanging = {3}
    hanging = begin(bed, 1, [1, 2], [3, 4])
    with pytest.raises(NotYet):
        hanging.result(0.05)
    assert "longer than" in hanging.result(PATIENCE_S).error
    assert script.log.index("agent down") < script.log.index("done 3")
    assert begin(bed, 2, [1, 2], [5, 6]).result(PATIENCE_S).error == ""


def test_a_broken_read_is_fenced_and_then_goes_over_grpc(bed: Bed) -> None:
    script, source, store, _ = bed
    script.breaking = {3}
    assert begin(bed, 1, [1, 2], [3, 4]).result(PATIENCE_S).error == ""
    np.testing.assert_array_equal(store.pages[[3, 4]], source.store.pages[[1, 2]])
    assert source.keeper.num_reads_begun == 1
    assert script.log.index("agent down") < script.log.index("done 3")


def test_a_peer_that_keeps_breaking_is_read_over_grpc_alone(bed: Bed) -> None:
    script, source, _, _ = bed
    script.breaking = {3}
    for lease_id in range(1, 5):
        assert begin(bed, lease_id, [1, 2], [3, 4]).result(PATIENCE_S).error == ""
    assert source.keeper.num_reads_begun == 4
    assert script.num_begun == 2


def test_reads_that_are_held_back_and_then_refused_end_without_another_read(bed: Bed) -> None:
    script, _, _, _ = bed
    script.hanging, script.refused = {3}, {5, 7, 9}
    healthy = begin(bed, 1, [1, 2], [3, 4])
    assert script.has_begun.wait(PATIENCE_S)
    refused = [begin(bed, lease_id, [1, 2], [target, target + 1]) for lease_id, target in ((2, 5), (3, 7), (4, 9))]
    script.hanging.clear()
    for outcome in (healthy, *refused):  # the first refusal fences the agent and holds the others back
        outcome.result(PATIENCE_S)


def test_a_source_without_an_agent_is_read_over_grpc(bed: Bed) -> None:
    script, _, store, reader = bed
    source = start_source("grpc", InProcessNetwork(), worker_id="prefill-9", incarnation=9)
    try:
        assert begin((script, source, store, reader), 1, [8], [2]).result(PATIENCE_S).error == ""
        np.testing.assert_array_equal(store.pages[2], source.store.pages[8])
        assert script.num_begun == 0
    finally:
        source.stop()


def test_closing_ends_a_hanging_read(bed: Bed) -> None:
    script, _, _, reader = bed
    script.hanging = {3}
    hanging = begin(bed, 1, [1, 2], [3, 4])
    assert script.has_begun.wait(PATIENCE_S)
    reader.close()
    assert hanging.result(0).error
    assert script.log.index("agent down") < script.log.index("done 3")


def test_the_real_store_is_a_page_store() -> None:
    layout = KVLayout(layers=(LayerShape(num_kv_heads=2, key_dim=4, value_dim=4),), block_size=4, dtype=torch.bfloat16)
    store: PageStore = KVStore(layout, 6)
    store.page(BlockId(2))[:] = bytes(range(store.page_bytes))
    assert store.base_address % 2 == 0
    first, second = seal(store, [BlockId(2), BlockId(3)], [1, 1])
    assert first.digest != second.digest

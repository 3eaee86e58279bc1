"""Eviction: always the least recently used among the leaves that nobody holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from duopool.core.errors import OutOfBlocks
from duopool.core.kv_events import KvRemoved, KvStored
from duopool.core.kv_manager import KVCacheManager
from duopool.core.types import BlockKey, RequestId

NUM_BLOCKS = 7
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class Model:
    """What is cached, who holds it, and when it was last let go."""

    def __init__(self) -> None:
        self.parents: dict[BlockKey, BlockKey | None] = {}
        self.last_use: dict[BlockKey, int] = {}
        self.live: dict[RequestId, tuple[BlockKey, ...]] = {}
        self.clock = 0

    def held(self) -> set[BlockKey]:
        return {key for keys in self.live.values() for key in keys}

    def let_go(self, request_id: RequestId) -> None:
        self.clock += 1
        keys = self.live.pop(request_id)
        held = self.held()
        self.last_use.update({key: self.clock for key in keys if key not in held})

    def apply(self, manager: KVCacheManager) -> None:
        for event in manager.drain_events():
            if isinstance(event, KvStored):
                for key, parent in zip(event.keys, (event.parent, *event.keys), strict=False):
                    assert parent is None or parent in self.parents
                    self.parents[key] = parent
                continue
            assert isinstance(event, KvRemoved)
            for key in event.keys:
                held = self.held()
                inner = set(self.parents.values())
                leaves = {leaf for leaf in self.parents if leaf not in inner and leaf not in held}
                assert key in leaves
                assert self.last_use[key] == min(self.last_use[leaf] for leaf in leaves)
                del self.parents[key], self.last_use[key]


@given(steps=st.lists(st.tuples(PROMPTS, st.booleans(), st.integers(0, 3)), max_size=30))
@settings(max_examples=150, deadline=None)
def test_the_least_recently_used_unheld_leaf_goes_first(steps: list[tuple[list[int], bool, int]]) -> None:
    manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=1)
    model = Model()
    for index, (prompt, keep, victim) in enumerate(steps):
        request_id = RequestId(str(index))
        keys = manager.keys(prompt)
        cached = manager.admit(request_id, prompt)
        model.live[request_id] = keys[:cached]
        try:
            manager.reserve(request_id, len(prompt))
        except OutOfBlocks:
            keep = False
        else:
            model.apply(manager)
            manager.publish(request_id, len(prompt))
            model.live[request_id] = keys
        model.apply(manager)
        if not keep:
            manager.free(request_id)
            model.let_go(request_id)
        if victim < len(model.live):
            done = list(model.live)[victim]
            manager.free(done)
            model.let_go(done)
        assert manager.num_cached == len(model.parents.keys() - model.held())
        manager.check()
    manager.reset_cache()
    model.apply(manager)
    assert set(model.parents) == model.held()


def test_looking_is_not_using() -> None:
    manager = KVCacheManager(num_blocks=2, block_size=1)
    for prompt in ([1], [2]):
        request_id = RequestId(str(prompt))
        manager.admit(request_id, prompt)
        manager.reserve(request_id, 1)
        manager.publish(request_id, 1)
        manager.free(request_id)
    assert manager.lookup(manager.keys([1])) == 1
    manager.admit(RequestId("new"), [3])
    manager.reserve(RequestId("new"), 1)
    assert manager.lookup(manager.keys([1])) == 0
    assert manager.lookup(manager.keys([2])) == 1


def test_a_cache_in_long_use_keeps_no_more_entries_than_it_needs() -> None:
    """Each use leaves a stale entry in the eviction queue; they must not pile up."""
    manager = KVCacheManager(num_blocks=8, block_size=1)
    for index in range(1000):
        request_id = RequestId(str(index))
        manager.admit(request_id, [index % 3, 0])
        manager.reserve(request_id, 2)
        manager.publish(request_id, 2)
        manager.free(request_id)
    manager.check()
    assert len(manager._cache._leaves) <= 2 * 8 + 65

"""The KV manager against a model that really stores something in the blocks.

Each slot of the model's memory holds (salt, all tokens up to its position), which is what KV is a function of. A
request whose slots hold its own prefix can only have shared what is equal, and was never overwritten by anybody.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duopool.core.block_keys import block_keys
from duopool.core.errors import DuopoolError, OutOfBlocks
from duopool.core.kv_events import KvEvent, KvRemoved, KvStored, net_changes
from duopool.core.kv_manager import AlreadyAdmitted, KVCacheManager, NotAdmitted
from duopool.core.types import BlockId, BlockKey, RequestId

NUM_BLOCKS = 10
# Half of the prompts are prefixes of one text, so that sharing is common.
TOKENS = st.integers(1, 14).map(lambda n: [0] * n) | st.lists(st.integers(0, 1), min_size=1, max_size=14)
SALTS = st.sampled_from([b"", b"", b"tenant"])


@dataclass
class Request:
    salt: bytes
    tokens: list[int]
    num_computed: int
    num_reserved: int = 0
    """Tokens the table was asked to hold."""
    is_wrong: bool = False
    """A block of it was discarded."""


@dataclass
class Pinned:
    blocks: list[BlockId]
    generations: list[int]


class ManagerMachine(RuleBasedStateMachine):
    @initialize(block_size=st.integers(1, 4))
    def start(self, block_size: int) -> None:
        self.block_size = block_size
        self.manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=block_size)
        self.requests: dict[RequestId, Request] = {}
        self.pinned: list[Pinned] = []
        self.memory: list[list[object]] = [[None] * block_size for _ in range(NUM_BLOCKS)]
        self.routers_view: set[BlockKey] = set()
        self.counter = 0
        self.has_discarded = False

    def new_id(self) -> RequestId:
        self.counter += 1
        return RequestId(f"r{self.counter}")

    def any_request(self, data: st.DataObject) -> RequestId:
        return data.draw(st.sampled_from(list(self.requests)))

    def slot(self, request_id: RequestId, position: int) -> tuple[BlockId, int]:
        return self.manager.block_ids(request_id)[position // self.block_size], position % self.block_size

    @rule(tokens=TOKENS, salt=SALTS, limit=st.none() | st.integers(0, 14))
    def admit(self, tokens: list[int], salt: bytes, limit: int | None) -> None:
        request_id = self.new_id()
        keys = self.manager.keys(tokens, salt)
        available = self.manager.lookup(keys) * self.block_size
        free = self.manager.num_free
        cached = self.manager.admit(request_id, tokens, salt=salt, max_cached_tokens=limit)
        wanted = available if limit is None else min(available, limit)
        assert cached == wanted - wanted % self.block_size
        assert self.manager.num_free == free
        self.requests[request_id] = Request(salt, list(tokens), cached, cached)
        with pytest.raises(AlreadyAdmitted):
            self.manager.admit(request_id, tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), more=st.integers(0, 14))
    def compute(self, data: st.DataObject, more: int) -> None:
        """Reserve, copy on write, write and publish as a worker's step does."""
        request_id = self.any_request(data)
        request = self.requests[request_id]
        end = min(request.num_computed + more, len(request.tokens))
        try:
            self.manager.reserve(request_id, end)
            request.num_reserved = max(request.num_reserved, end)
            copies = self.manager.prepare_write(request_id, request.num_computed, end)
        except OutOfBlocks:
            assert self.manager.num_available < 2 * self.manager.blocks_for(end)
            return
        for copy in copies:
            self.memory[copy.target] = list(self.memory[copy.source])
        for position in range(request.num_computed, end):
            block_id, offset = self.slot(request_id, position)
            self.memory[block_id][offset] = (request.salt, tuple(request.tokens[: position + 1]))
        request.num_computed = end
        before = self.manager.snapshot()
        self.manager.publish(request_id, end)
        keys = block_keys(request.tokens[:end], self.block_size, salt=request.salt)
        if request.is_wrong:
            assert self.manager.snapshot() == before
        elif not self.has_discarded:
            assert self.manager.lookup(keys) == len(keys)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def discard(self, block: int) -> None:
        """What a block holds is not what was written: nobody matches it, or what is behind it, from now on."""
        block_id = BlockId(block)
        self.manager.discard({block_id})
        assert block_id not in self.manager.ledger().cached
        self.memory[block_id] = ["damaged"] * self.block_size
        self.has_discarded = True
        for request_id, request in self.requests.items():
            request.is_wrong |= block_id in self.manager.block_ids(request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=TOKENS)
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        request_id = self.any_request(data)
        self.requests[request_id].tokens += tokens
        self.manager.append(request_id, tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, child = self.any_request(data), self.new_id()
        request = self.requests[parent]
        free = self.manager.num_free
        self.manager.fork(parent, child)
        in_use = self.manager.blocks_for(len(request.tokens))
        assert list(self.manager.block_ids(child)) == list(self.manager.block_ids(parent))[:in_use]
        assert self.manager.num_free == free
        num_reserved = min(request.num_reserved, len(request.tokens))
        self.requests[child] = replace(request, tokens=list(request.tokens), num_reserved=num_reserved)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def two_writers_never_share(self, data: st.DataObject) -> None:
        """After prepare_write nobody else sees the blocks, and a second call has nothing to copy."""
        request_id = self.any_request(data)
        end = len(self.manager.block_ids(request_id)) * self.block_size
        start = data.draw(st.integers(0, end))
        before = list(self.manager.block_ids(request_id))
        try:
            copies = self.manager.prepare_write(request_id, start, end)
        except OutOfBlocks:
            assert list(self.manager.block_ids(request_id)) == before
            return
        for copy in copies:
            self.memory[copy.target] = list(self.memory[copy.source])
        mine = set(self.manager.block_ids(request_id)[start // self.block_size :]) if start < end else set()
        for other in self.requests:
            assert other == request_id or not mine & set(self.manager.block_ids(other))
        for pin in self.pinned:
            assert not mine & set(pin.blocks)
        assert self.manager.prepare_write(request_id, start, end) == []

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(list(range(NUM_BLOCKS))), unique=True, max_size=4))
        table = list(self.manager.block_ids(self.any_request(data)))
        blocks = [table[index % len(table)] for index in blocks] if table else []
        blocks = list(dict.fromkeys(blocks))
        self.manager.pin(blocks)
        self.pinned.append(Pinned(blocks, [self.manager.generation(block) for block in blocks]))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        assert [self.manager.generation(block) for block in pin.blocks] == pin.generations
        times = Counter(block for other in [pin, *self.pinned] for block in other.blocks)
        for block in pin.blocks:
            with pytest.raises(ValueError, match="pinned"):
                self.manager.unpin([block] * (times[block] + 1))
        self.manager.unpin(pin.blocks)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request_id = self.any_request(data)
        del self.requests[request_id]
        cached = self.manager.snapshot()
        self.manager.free(request_id)
        assert not self.manager.has(request_id)
        assert self.manager.snapshot() == cached
        with pytest.raises(NotAdmitted):
            self.manager.free(request_id)

    @rule()
    def reset_cache(self) -> None:
        self.manager.reset_cache()
        assert self.manager.num_cached == 0
        assert self.manager.num_available == self.manager.num_free

    @rule()
    def routers_hear_of_it(self) -> None:
        removed, stored = net_changes(self.manager.drain_events())
        assert self.routers_view >= set(removed)
        self.routers_view -= set(removed)
        for piece in stored:
            assert piece.parent is None or piece.parent in self.routers_view
            assert not self.routers_view & set(piece.keys)
            self.routers_view |= set(piece.keys)
        assert self.routers_view == {key for path in self.manager.snapshot() for key in path}

    @invariant()
    def conserves_blocks_and_content(self) -> None:
        self.manager.check()
        assert 0 <= self.manager.usage <= 1
        for request_id, request in self.requests.items():
            table = self.manager.block_ids(request_id)
            assert self.manager.num_tokens(request_id) == len(request.tokens)
            assert 0 <= len(table) * self.block_size - request.num_reserved < self.block_size
            for position in range(request.num_computed):
                block_id, offset = self.slot(request_id, position)
                content = (request.salt, tuple(request.tokens[: position + 1]))
                assert request.is_wrong or self.memory[block_id][offset] == content
        for pin in self.pinned:
            assert [self.manager.generation(block) for block in pin.blocks] == pin.generations

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for pin in self.pinned:
            self.manager.unpin(pin.blocks)
        for request_id in self.requests:
            self.manager.free(request_id)
        assert self.manager.num_available == NUM_BLOCKS
        self.manager.reset_cache()
        assert self.manager.num_free == NUM_BLOCKS
        self.manager.check()


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def run(manager: KVCacheManager, name: str, tokens: list[int], *, salt: bytes = b"", keep: bool = False) -> int:
    """Admit, compute and publish `tokens`, then free them unless `keep`; returns the cached tokens."""
    request_id = RequestId(name)
    cached = manager.admit(request_id, tokens, salt=salt)
    manager.reserve(request_id, len(tokens))
    manager.publish(request_id, len(tokens))
    if not keep:
        manager.free(request_id)
    return cached


def test_reserve_is_all_or_nothing_and_says_the_numbers() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=2)
    run(manager, "cached", [1, 2, 3, 4])
    request_id = RequestId("big")
    manager.admit(request_id, [9] * 20)
    before = manager.snapshot()
    with pytest.raises(OutOfBlocks) as error:
        manager.reserve(request_id, 9)
    assert (error.value.needed, error.value.free) == (5, 4)
    assert manager.snapshot() == before
    manager.reserve(request_id, 8)
    assert manager.snapshot() == []
    manager.check()


def test_publishing_more_than_there_is_is_refused() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=2)
    request_id = RequestId("short")
    manager.admit(request_id, [1, 2, 3, 4])
    manager.reserve(request_id, 2)
    for num_computed in (4, 6):
        with pytest.raises(ValueError, match="room for 2"):
            manager.publish(request_id, num_computed)
    assert manager.drain_events() == []
    manager.check()


@pytest.mark.parametrize(("limit", "cached"), [(None, 6), (7, 6), (6, 6), (5, 4), (1, 0), (0, 0), (-1, 0)])
def test_the_cached_prefix_stops_at_the_limit(limit: int | None, cached: int) -> None:
    manager = KVCacheManager(num_blocks=4, block_size=2)
    run(manager, "first", [1, 2, 3, 4, 5, 6])
    assert manager.admit(RequestId("second"), [1, 2, 3, 4, 5, 6], max_cached_tokens=limit) == cached
    assert len(manager.block_ids(RequestId("second"))) * 2 == cached
    manager.check()


def test_a_fork_copies_the_open_block_once_and_the_last_writer_keeps_the_original() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=2)
    parent, child = RequestId("parent"), RequestId("child")
    run(manager, "parent", [1, 2, 3], keep=True)
    manager.fork(parent, child)
    shared = list(manager.block_ids(parent))
    (copy,) = manager.prepare_write(child, 3, 4)
    assert copy.source == shared[1]
    assert list(manager.block_ids(child)) == [shared[0], copy.target]
    assert manager.prepare_write(parent, 3, 4) == []
    assert list(manager.block_ids(parent)) == shared
    manager.check()


def test_a_discarded_block_takes_what_is_behind_it_along_and_spares_the_rest() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=2)
    run(manager, "kept", [1, 2, 3, 4, 5, 6], keep=True)
    run(manager, "branch", [1, 2, 9, 9])
    blocks = list(manager.block_ids(RequestId("kept")))
    manager.discard({blocks[1]})
    assert manager.lookup(manager.keys([1, 2, 3, 4, 5, 6])) == 1
    assert manager.lookup(manager.keys([1, 2, 9, 9])) == 2
    assert list(manager.block_ids(RequestId("kept"))) == blocks
    assert run(manager, "anew", [1, 2, 3, 4, 5, 6]) == 2
    assert manager.lookup(manager.keys([1, 2, 3, 4, 5, 6])) == 3
    manager.free(RequestId("kept"))
    assert manager.num_available == 8
    manager.check()


def test_a_cached_block_is_never_written() -> None:
    manager = KVCacheManager(num_blocks=2, block_size=2)
    request_id = RequestId("only")
    run(manager, "only", [1, 2], keep=True)
    (copy,) = manager.prepare_write(request_id, 1, 2)
    assert list(manager.block_ids(request_id)) == [copy.target]
    assert manager.num_cached == 1
    assert manager.lookup(manager.keys([1, 2])) == 1
    manager.check()


def test_two_tenants_with_one_prompt_share_nothing() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=2)
    assert run(manager, "a", [1, 2, 3, 4], salt=b"a", keep=True) == 0
    assert run(manager, "b", [1, 2, 3, 4], salt=b"b", keep=True) == 0
    assert not set(manager.block_ids(RequestId("a"))) & set(manager.block_ids(RequestId("b")))
    assert run(manager, "a again", [1, 2, 3, 4, 5], salt=b"a") == 4


def test_a_block_is_published_again_when_the_twin_it_deferred_to_is_gone() -> None:
    """Two requests compute one prefix at once; the one whose blocks were cached leaves and they are evicted."""
    manager = KVCacheManager(num_blocks=8, block_size=2)
    first, second = RequestId("first"), RequestId("second")
    for request_id in (first, second):
        manager.admit(request_id, [1, 2, 3, 4])
        manager.reserve(request_id, 4)
    manager.publish(first, 2)
    manager.publish(second, 2)
    manager.free(first)
    manager.reset_cache()
    assert manager.snapshot() == []
    manager.publish(second, 4)
    manager.free(second)
    assert run(manager, "third", [1, 2, 3, 4]) == 4
    manager.check()


def test_a_block_behind_another_requests_prefix_keeps_that_prefix() -> None:
    """`second` holds a private twin of the first block, so only the child in the tree keeps the parent there."""
    manager = KVCacheManager(num_blocks=8, block_size=2)
    first, second = RequestId("first"), RequestId("second")
    for request_id in (first, second):
        manager.admit(request_id, [1, 2, 3, 4])
        manager.reserve(request_id, 4)
    manager.publish(first, 2)
    manager.publish(second, 4)
    manager.free(first)
    manager.reset_cache()
    assert manager.lookup(manager.keys([1, 2, 3, 4])) == 2
    assert manager.num_cached == 0
    manager.check()
    manager.free(second)
    assert manager.num_cached == 2
    manager.check()


@pytest.mark.parametrize("name", ["reserve", "append", "publish", "prepare_write", "block_ids", "num_tokens", "free"])
def test_an_unknown_request_is_an_error_of_ours(name: str) -> None:
    manager = KVCacheManager(num_blocks=2, block_size=2)
    arguments = {"reserve": (1,), "append": ([1],), "publish": (1,), "prepare_write": (0, 1)}
    with pytest.raises(DuopoolError, match="ghost"):
        getattr(manager, name)(RequestId("ghost"), *arguments.get(name, ()))


def test_a_key_that_came_and_went_is_in_no_summary() -> None:
    a, b, c, d = (BlockKey(bytes([letter])) for letter in b"abcd")
    events: list[KvEvent] = [KvStored((b, c), a), KvRemoved((c, d)), KvStored((d,), None)]
    assert net_changes(events) == ((), (KvStored((b,), a),))

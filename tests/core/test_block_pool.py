"""The block pool against a model: counts, generations, all or nothing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from duopool.core.block_pool import BlockPool
from duopool.core.block_table import BlockTable, blocks_for
from duopool.core.errors import OutOfBlocks
from duopool.core.types import BlockId

NUM_BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """`counts` maps every block that is not free to its reference count."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.counts: dict[BlockId, int] = {}
        self.generations = [0] * NUM_BLOCKS

    @rule(n=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, n: int) -> None:
        free = NUM_BLOCKS - len(self.counts)
        if n > free:
            with pytest.raises(OutOfBlocks) as error:
                self.pool.allocate(n)
            assert (error.value.needed, error.value.free) == (n, free)
            return
        taken = self.pool.allocate(n)
        assert len(set(taken)) == n
        assert not self.counts.keys() & set(taken)
        for block_id in taken:
            self.counts[block_id] = 1
            self.generations[block_id] += 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1).map(BlockId))
    def retain(self, block: BlockId) -> None:
        if block not in self.counts:
            with pytest.raises(ValueError, match="free"):
                self.pool.retain([block])
            return
        assert self.pool.retain([block]) == ([block] if self.counts[block] == 0 else [])
        self.counts[block] += 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1).map(BlockId))
    def release(self, block: BlockId) -> None:
        if not self.counts.get(block):
            with pytest.raises(ValueError, match="not referenced"):
                self.pool.release([block])
            return
        self.counts[block] -= 1
        assert self.pool.release([block]) == ([block] if self.counts[block] == 0 else [])

    @rule(block=st.integers(0, NUM_BLOCKS - 1).map(BlockId))
    def give_back(self, block: BlockId) -> None:
        if self.counts.get(block) != 0:
            with pytest.raises(ValueError, match="free already or still referenced"):
                self.pool.give_back([block])
            return
        self.pool.give_back([block])
        del self.counts[block]

    @precondition(lambda self: self.counts)
    @rule()
    def give_all_back(self) -> None:
        for block_id, count in self.counts.items():
            self.pool.release([block_id] * count)
        self.pool.give_back(self.counts)
        self.counts = {}
        assert self.pool.num_free == NUM_BLOCKS

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.num_free == NUM_BLOCKS - len(self.counts)
        for block_id in map(BlockId, range(NUM_BLOCKS)):
            assert self.pool.ref_count(block_id) == self.counts.get(block_id, 0)
            assert self.pool.is_free(block_id) == (block_id not in self.counts)
            assert self.pool.generation(block_id) == self.generations[block_id]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_table_holds_what_was_reserved_and_wastes_less_than_a_block(block_size: int) -> None:
    for num_tokens in range(50):
        table = BlockTable(block_size, map(BlockId, range(blocks_for(num_tokens, block_size))))
        assert 0 <= table.capacity - num_tokens < block_size
        assert table.blocks_missing(num_tokens) == 0
        assert table.blocks_missing(table.capacity + 1) == 1
        for start in range(num_tokens):
            assert set(table.touched(start, num_tokens)) == {p // block_size for p in range(start, num_tokens)}
        with pytest.raises(IndexError):
            table.touched(0, table.capacity + 1)

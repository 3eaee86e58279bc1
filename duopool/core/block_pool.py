"""The blocks of one worker's KV store: who counts on each, and which are free.

Owns reference counts, generations and the free list. A block is free, referenced, or neither: nobody counts on it and
its owner (the prefix cache) keeps it. Does not know sequences, keys or what a block holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duopool.core.errors import OutOfBlocks
from duopool.core.types import BlockId


class BlockPool:
    """`num_blocks` blocks, all free at first. The block freed last is taken first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = [BlockId(index) for index in range(num_blocks - 1, -1, -1)]
        self._is_free = bytearray(b"\x01") * num_blocks
        self._ref_counts = [0] * num_blocks
        self._generations = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block_id: BlockId) -> int:
        return self._ref_counts[block_id]

    def generation(self, block_id: BlockId) -> int:
        """How often this block was allocated: tells its present content from what it held before."""
        return self._generations[block_id]

    def free_list(self) -> tuple[BlockId, ...]:
        """The free list as it stands; the block at its end is taken first."""
        return tuple(self._free)

    def is_free(self, block_id: BlockId) -> bool:
        return bool(self._is_free[block_id])

    def allocate(self, n: int) -> list[BlockId]:
        """Take `n` blocks with a count of one each, or none and raise OutOfBlocks."""
        if n > len(self._free):
            raise OutOfBlocks(needed=n, free=len(self._free))
        if n <= 0:
            return []
        taken = self._free[-n:]
        taken.reverse()
        del self._free[-n:]
        for block_id in taken:
            self._is_free[block_id] = 0
            self._ref_counts[block_id] = 1
            self._generations[block_id] += 1
        return taken

    def retain(self, block_ids: Sequence[BlockId]) -> list[BlockId]:
        """Count on blocks once more; return those nobody counted on before. ValueError for a free block."""
        for block_id in block_ids:
            if block_id < 0 or self._is_free[block_id]:
                raise ValueError(f"block {block_id} is free")
        counts = self._ref_counts
        revived = []
        for block_id in block_ids:
            if counts[block_id] == 0:
                revived.append(block_id)
            counts[block_id] += 1
        return revived

    def release(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """Count on blocks once less; return those nobody counts on any more. The caller keeps them or gives them back.

        ValueError at a block that nobody counts on.
        """
        counts = self._ref_counts
        dropped = []
        for block_id in block_ids:
            if counts[block_id] <= 0:
                raise ValueError(f"block {block_id} is not referenced")
            counts[block_id] -= 1
            if counts[block_id] == 0:
                dropped.append(block_id)
        return dropped

    def give_back(self, block_ids: Iterable[BlockId]) -> None:
        """Put blocks that nobody counts on back on the free list. ValueError at any other block."""
        for block_id in block_ids:
            if self._is_free[block_id] or self._ref_counts[block_id]:
                raise ValueError(f"block {block_id} is free already or still referenced")
            self._is_free[block_id] = 1
            self._free.append(block_id)

    def check(self) -> None:
        """Raise AssertionError unless the free list holds each free block once and no free block is referenced."""
        assert len(set(self._free)) == len(self._free) == sum(self._is_free)
        assert all(self._is_free[block_id] and not self._ref_counts[block_id] for block_id in self._free)
        assert all(count >= 0 for count in self._ref_counts)

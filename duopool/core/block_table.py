"""The block table of one sequence: position -> block.

Owns the order of the blocks and the arithmetic between tokens and blocks. Does not own the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from duopool.core.types import BlockId


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockTable:
    """Blocks of one sequence; position p lives in slot p % block_size of `block_ids[p // block_size]`."""

    __slots__ = ("block_ids", "block_size")

    def __init__(self, block_size: int, block_ids: Iterable[BlockId] = ()) -> None:
        self.block_size = block_size
        self.block_ids: list[BlockId] = list(block_ids)

    @property
    def capacity(self) -> int:
        """Tokens that the table has room for."""
        return len(self.block_ids) * self.block_size

    def blocks_missing(self, num_tokens: int) -> int:
        """Blocks to add before the table holds `num_tokens` tokens."""
        return max(0, blocks_for(num_tokens, self.block_size) - len(self.block_ids))

    def touched(self, start: int, end: int) -> range:
        """Indices of the blocks that hold positions [start, end). IndexError past the capacity."""
        if not 0 <= start <= end <= self.capacity:
            raise IndexError(f"positions [{start}, {end}) of a table with room for {self.capacity} tokens")
        if start == end:
            return range(0)
        return range(start // self.block_size, blocks_for(end, self.block_size))

    def extend(self, block_ids: Iterable[BlockId]) -> None:
        self.block_ids.extend(block_ids)

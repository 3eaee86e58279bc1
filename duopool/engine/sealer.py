"""Seals blocks: names their content by a digest, and remembers digests.

A full block is never written again under the same generation, so a cached prefix is digested once, not once a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duopool.core.messages import SealedBlock
from duopool.core.types import BlockId

SealBlocks = Callable[[Sequence[BlockId], Sequence[int]], tuple[SealedBlock, ...]]
"""Digest pages as they are now: (block ids, generations) -> sealed blocks, in order."""


class Sealer:
    """Used by the step thread alone."""

    def __init__(self, seal: SealBlocks) -> None:
        self._seal = seal
        self._known: dict[BlockId, SealedBlock] = {}

    def seal(self, block_ids: Sequence[BlockId], generations: Sequence[int]) -> tuple[SealedBlock, ...]:
        """Blocks that will not be written again under these generations."""
        fresh = [
            (block_id, generation)
            for block_id, generation in zip(block_ids, generations, strict=True)
            if (known := self._known.get(block_id)) is None or known.generation != generation
        ]
        if fresh:
            for sealed in self.seal_once([one[0] for one in fresh], [one[1] for one in fresh]):
                self._known[sealed.block_id] = sealed
        return tuple(self._known[block_id] for block_id in block_ids)

    def seal_once(self, block_ids: Sequence[BlockId], generations: Sequence[int]) -> tuple[SealedBlock, ...]:
        """Blocks as they are now, although they may be written again: the digest is not remembered."""
        return self._seal(block_ids, generations)

"""Seals blocks: knows which ones a step finishes, names their content by a digest, and remembers digests.

A full block is never written again under the same generation, so a cached prefix is digested once, not once a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import SealedBlock
from duopool.core.step import Chunk
from duopool.core.types import BlockId
from duopool.prefill_worker.prefill_request import PrefillRequest

SealBlocks = Callable[[Sequence[BlockId], Sequence[int]], tuple[SealedBlock, ...]]
"""Digest pages as they are now: (block ids, generations) -> sealed blocks, in order."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What one step does for one prompt."""

    request: PrefillRequest
    num_tokens: int
    finished: tuple[BlockId, ...]
    """Blocks that are finished after the step and not listed yet."""
    generations: tuple[int, ...]


def stretch_of(request: PrefillRequest, chunk: Chunk, manager: KVCacheManager) -> Stretch:
    """Look ahead at a step: its blocks may be given away before it has ended, their generations now are the step's."""
    end = chunk.start + len(chunk.token_ids)
    is_last = end == request.num_tokens
    num_finished = manager.blocks_for(end) if is_last else end // manager.block_size
    finished = tuple(chunk.block_ids[request.num_listed_blocks : num_finished])
    generations = tuple(manager.generation(block_id) for block_id in finished)
    return Stretch(request, len(chunk.token_ids), finished, generations)


class Sealer:
    """Used by the step thread alone."""

    def __init__(self, seal: SealBlocks) -> None:
        self._seal = seal
        self._known: dict[BlockId, SealedBlock] = {}

    def seal(self, stretch: Stretch) -> tuple[SealedBlock, ...]:
        """Blocks that are finished: full, or the last of their sequence."""
        fresh = [
            (block_id, generation)
            for block_id, generation in zip(stretch.finished, stretch.generations, strict=True)
            if (known := self._known.get(block_id)) is None or known.generation != generation
        ]
        if fresh:
            for sealed in self._seal([one[0] for one in fresh], [one[1] for one in fresh]):
                self._known[sealed.block_id] = sealed
        return tuple(self._known[block_id] for block_id in stretch.finished)

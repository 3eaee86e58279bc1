"""What one step does for one prompt, looked up before the step runs."""

from __future__ import annotations

from dataclasses import dataclass

from duopool.core.kv_manager import KVCacheManager
from duopool.core.step import Chunk
from duopool.core.types import BlockId
from duopool.prefill_worker.prefill_request import PrefillRequest


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

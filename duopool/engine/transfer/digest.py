"""Digests of pages: how P seals blocks and how D knows that a page arrived as it was sealed.

CRC-32 finds damage and reads of a page that was written meanwhile, at memory speed; it is no defence against an
attacker, who could not reach this wire without the cluster's network anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from duopool.core.messages import SealedBlock
from duopool.core.types import BlockId
from duopool.engine.transfer.page_store import PageStore
from duopool.kernels import ops


def page_digest(store: PageStore, block_id: BlockId) -> int:
    """CRC-32 of the whole page."""
    return ops.crc32(store.page(block_id))


def seal(store: PageStore, block_ids: Sequence[BlockId], generations: Sequence[int]) -> tuple[SealedBlock, ...]:
    """Name the pages as they are now; nobody may write into them afterwards."""
    return tuple(
        SealedBlock(block_id, generation, page_digest(store, block_id))
        for block_id, generation in zip(block_ids, generations, strict=True)
    )


def mismatch(source: SealedBlock, digest: int) -> str:
    """Says what is wrong if a page that came from `source` has this digest; empty if nothing is."""
    if digest == source.digest:
        return ""
    return f"page of block {source.block_id} has digest {digest:08x}, sealed as {source.digest:08x}"


def find_mismatch(store: PageStore, sources: Sequence[SealedBlock], targets: Sequence[BlockId]) -> str:
    """Check the pages `targets` against what was sealed; says the first fault, or is empty."""
    for source, target in zip(sources, targets, strict=True):
        fault = mismatch(source, page_digest(store, target))
        if fault:
            return fault
    return ""

"""What may happen to a page between two workers, and where it is made to happen.

Over gRPC the bytes are damaged as they come from the wire; from shared memory as they are loaded from P's page; over
NIXL, where nobody is between the two memories, when they have arrived in D's page and D has not looked at it yet. So it
is known of every read what must be detected.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Verdict
from duopool.core.types import BlockId
from duopool.engine import shared_memory
from duopool.engine.transfer.digest import page_digest
from duopool.engine.transfer.nixl_agent import NixlAgent, NixlPeer
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source_client import SourceClient
from duopool.engine.transfer.transport import BlockReader, ReadOutcome
from duopool.kernels import ops


class Damage(StrEnum):
    BIT = "bit flip"
    CUT = "truncation"
    SWAP = "swapped blocks"
    STALE = "stale generation"
    OTHER = "another request's block"


ReadKey = tuple[int, int, BlockId]
"""Lease, attempt and first block: a read that is made again has those of the one before, which is over."""


def key_of(lease_id: int, attempt: int, sources: Sequence[SealedBlock]) -> ReadKey:
    return lease_id, attempt, sources[0].block_id


class Saboteur:
    """Plans damage read by read, does it page by page, and judges what the reader says. Any thread."""

    def __init__(self, pages: PageStore, *, rate: float, seed: int) -> None:
        self.num_done: Counter[Damage] = Counter()
        self.num_missed: Counter[Damage] = Counter()
        self.num_false_alarms = 0
        self.num_reads = 0
        self._pages = pages
        self._rate = rate
        self._random = random.Random(seed)
        self._planned: dict[ReadKey, dict[BlockId, tuple[Damage, BlockId]]] = {}
        self._sealed: dict[ReadKey, dict[BlockId, bytes]] = {}
        """What the pages of a planned read hold when it begins."""
        self._hit: dict[ReadKey, Damage] = {}
        """Reads under way in which something was damaged."""
        self._history: dict[BlockId, bytes] = {}
        """What a block held under an earlier generation."""
        self._seen: dict[BlockId, bytes] = {}
        self._lock = threading.Lock()

    def plan(self, read: ReadKey, sources: Sequence[SealedBlock], *, may_hit: bool) -> None:
        """A read begins."""
        with self._lock:
            self.num_reads += 1
            for source in sources:
                self._remember(source.block_id)
            is_sealed = all(page_digest(self._pages, one.block_id) == one.digest for one in sources)
            # A read of an attempt that was given up may find its blocks given to others: it would be damaged anyway.
            if not may_hit or not is_sealed or self._random.random() >= self._rate:
                return
            kind = self._random.choice(list(Damage))
            mine = [source.block_id for source in sources]
            victim = self._random.choice(mine)
            others = [block for block in mine if block != victim] if kind is Damage.SWAP else []
            partner = self._random.choice(others or self._foreign(mine))
            self._sealed[read] = {block: self._seen[block] for block in mine}
            self._planned[read] = {victim: (kind, partner)}
            if kind is Damage.SWAP and partner in mine:
                self._planned[read][partner] = (kind, victim)

    def damage(self, read: ReadKey, block_id: BlockId, page: bytes, before: bytes = b"") -> bytes:
        """The page as it arrives; if it is cut off, the rest of what was there before stays, if anything was."""
        with self._lock:
            kind, partner = self._planned.get(read, {}).pop(block_id, (None, block_id))
            if kind is None:
                return page
            arrives = page
            if kind is Damage.CUT:
                end = self._random.randrange(len(page))
                arrives = page[:end] + before[end:]
            elif kind in (Damage.SWAP, Damage.OTHER):
                arrives = bytes(self._pages.page(partner))
            elif kind is Damage.STALE:
                arrives = self._history.get(block_id, page)
            sealed = self._sealed[read][block_id]
            if arrives in (page, sealed):  # nothing was changed by that, or made good again
                page, kind, at = sealed, Damage.BIT, self._random.randrange(8 * len(sealed))
                arrives = page[: at // 8] + bytes([page[at // 8] ^ 1 << at % 8]) + page[at // 8 + 1 :]
            self._hit[read] = kind
            return arrives

    def judge(self, read: ReadKey, sources: Sequence[SealedBlock], outcome: ReadOutcome) -> None:
        """A read has ended: what was damaged in it must be known.

        A read of an attempt that was given up may find its blocks given to others; that is no false alarm.
        """
        with self._lock:
            self._planned.pop(read, None)
            self._sealed.pop(read, None)
            kind = self._hit.pop(read, None)
            if kind is not None:
                self.num_done[kind] += 1
                self.num_missed[kind] += not outcome.is_damaged
            if kind is None and outcome.is_damaged:
                self.num_false_alarms += all(page_digest(self._pages, one.block_id) == one.digest for one in sources)

    def _foreign(self, mine: Sequence[BlockId]) -> list[BlockId]:
        return [BlockId(block) for block in range(self._pages.num_blocks) if block not in mine]

    def _remember(self, block_id: BlockId) -> None:
        page = bytes(self._pages.page(block_id))
        if (before := self._seen.get(block_id)) is not None and before != page:
            self._history[block_id] = before
        self._seen[block_id] = page


class SabotagedClient(SourceClient):
    """Damages what a gRPC source sends."""

    def __init__(self, saboteur: Saboteur) -> None:
        super().__init__(confirm_timeout_s=2.0)
        self._saboteur = saboteur

    def read(self, address: str, read: ReadBlocks, *, timeout_s: float) -> Any:
        return _SabotagedCall(super().read(address, read, timeout_s=timeout_s), read, self._saboteur)

    def forget(self, address: str, call: Any) -> None:
        super().forget(address, call.call if isinstance(call, _SabotagedCall) else call)


class _SabotagedCall:
    def __init__(self, call: Any, read: ReadBlocks, saboteur: Saboteur) -> None:
        self.call, self._read, self._saboteur = call, read, saboteur

    def __iter__(self) -> Iterator[bytes]:
        key = key_of(self._read.lease_id, self._read.attempt, self._read.blocks)
        for block, page in zip(self._read.blocks, self.call, strict=True):
            yield self._saboteur.damage(key, block.block_id, page)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)


def sabotaged_agent(saboteur: Saboteur, reads: dict[tuple[BlockId, ...], ReadKey]) -> Callable[..., NixlAgent]:
    """An agent whose reads end damaged; `reads` says by its targets which one a transfer belongs to."""

    class SabotagedAgent(NixlAgent):
        def __init__(self, store: PageStore, name: str) -> None:
            super().__init__(store, name)
            self._mine = store
            self._running: dict[int, tuple[Sequence[BlockId], Sequence[BlockId], list[bytes]]] = {}

        def begin(self, peer: NixlPeer, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> Any:
            before = [bytes(self._mine.page(target)) for target in targets]
            transfer = super().begin(peer, sources, targets)
            self._running[id(transfer)] = sources, targets, before
            return transfer

        def is_done(self, transfer: Any) -> bool:
            done = super().is_done(transfer)
            if done:
                sources, targets, before = self._running.pop(id(transfer))
                for source, target, old in zip(sources, targets, before, strict=True):
                    arrives = saboteur.damage(reads[tuple(targets)], source, bytes(self._mine.page(target)), old)
                    self._mine.page(target)[:] = arrives
            return done

    return SabotagedAgent


def sabotaged_copy(saboteur: Saboteur, reads: dict[tuple[BlockId, ...], ReadKey]) -> Callable[..., list[int]]:
    """`ops.copy_pages` from memory that is damaged; `reads` says by its targets which one a call belongs to."""

    def copy_pages(
        source_address: int,
        sources: Sequence[BlockId],
        target_address: int,
        targets: Sequence[BlockId],
        *,
        page_bytes: int,
    ) -> list[int]:
        digests = []
        for source, target in zip(sources, targets, strict=True):
            page = ctypes.string_at(source_address + source * page_bytes, page_bytes)
            before = ctypes.string_at(target_address + target * page_bytes, page_bytes)
            arrives = np.frombuffer(saboteur.damage(reads[tuple(targets)], source, page, before), dtype=np.uint8)
            digests += ops.copy_pages(arrives.ctypes.data, [0], target_address, [target], page_bytes=page_bytes)
        return digests

    return copy_pages


class WatchedReader:
    """D's reader, with the saboteur told of every read."""

    def __init__(
        self,
        reader: BlockReader,
        saboteur: Saboteur,
        reads: dict[tuple[BlockId, ...], ReadKey],
        *,
        last_hit_attempt: int,
    ) -> None:
        self._reader, self._saboteur, self._reads = reader, saboteur, reads
        self._last_hit_attempt = last_hit_attempt

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        key = self._reads[tuple(targets)] = key_of(lease.lease_id, attempt, sources)
        self._saboteur.plan(key, sources, may_hit=attempt <= self._last_hit_attempt)

        def ended(outcome: ReadOutcome) -> None:
            self._saboteur.judge(key, sources, outcome)
            done(outcome)

        self._reader.read(lease, attempt, sources, targets, ended)

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        self._reader.confirm(lease, attempt, done)

    def close(self) -> None:
        self._reader.close()


class ByteStore:
    """Pages of bytes whose first ones are token ids and whose others are noise."""

    def __init__(self, num_blocks: int, *, tokens_per_page: int, seed: int, page_bytes: int = 1024) -> None:
        allocated = shared_memory.allocate(num_blocks * page_bytes)
        memory, self.shared_memory = allocated or (bytearray(num_blocks * page_bytes), None)
        self._bytes = np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, page_bytes)
        self._bytes[:] = np.random.default_rng(seed).integers(0, 256, self._bytes.shape, dtype=np.uint8)
        self.pages = self._bytes[:, : 4 * tokens_per_page].view(np.int32)
        self.num_blocks, self.page_bytes, self.digest = num_blocks, page_bytes, "tokens and noise"

    @property
    def base_address(self) -> int:
        return int(self._bytes.ctypes.data)

    def page(self, block_id: BlockId) -> memoryview:
        return memoryview(self._bytes[block_id])

"""A transport inside one process, for tests and simulations: the same refusals and checks, and a copy for the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import BlockId
from duopool.engine.transfer.digest import find_mismatch
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source import KvSource
from duopool.engine.transfer.transport import ReadOutcome


class InProcessNetwork:
    """Which source answers at which address; tests take sources away and put others in their place."""

    def __init__(self) -> None:
        self._sources: dict[str, KvSource] = {}

    def listen(self, address: str, source: KvSource) -> None:
        """From now on `source` answers at `address`."""
        self._sources[address] = source

    def hang_up(self, address: str) -> None:
        """Nobody answers at `address` any more."""
        self._sources.pop(address, None)

    def find(self, address: str) -> KvSource | None:
        """Who answers at `address`."""
        return self._sources.get(address)


class InProcessReader:
    """A `BlockReader` that copies pages from stores in the same process.

    Work runs on a thread of its own, or is given to `run`: a simulation decides there when it happens.
    """

    def __init__(
        self, store: PageStore, network: InProcessNetwork, *, run: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        self._store = store
        self._network = network
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="in-process-reader") if run is None else None
        self._run = run
        self._closed = False

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Copy `sources` over own pages `targets`. Raises RuntimeError once closed."""
        blocks, own = tuple(sources), tuple(targets)
        if len(blocks) != len(own):
            raise ValueError(f"{len(blocks)} sources for {len(own)} targets")
        asked = ReadBlocks(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, blocks=blocks)
        self._submit(lambda: done(self._copy(lease.source_address, asked, own)))

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        """Ask for P's verdict, releasing the lease if it is good. Raises RuntimeError once closed."""
        asked = Validate(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, release=True)

        def ask() -> None:
            source = self._find(lease.source_address)
            done(Verdict(ok=False, reason=source) if isinstance(source, str) else source.validate(asked))

        self._submit(ask)

    def close(self) -> None:
        """End all reads (those that have not begun get an error) and the thread."""
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _submit(self, work: Callable[[], None]) -> None:
        if self._closed:
            raise RuntimeError("the reader is closed")
        if self._run is not None:
            self._run(work)
        elif self._thread is not None:
            self._thread.submit(work)

    def _find(self, address: str) -> KvSource | str:
        if self._closed:
            return "the reader is closed"
        return self._network.find(address) or f"nobody answers at {address}"

    def _copy(self, address: str, asked: ReadBlocks, targets: tuple[BlockId, ...]) -> ReadOutcome:
        source = self._find(address)
        if isinstance(source, str):
            return ReadOutcome(error=source)
        if source.store.digest != self._store.digest:
            return ReadOutcome(error=f"pages of layout {source.store.digest}, wanted {self._store.digest}")
        refusal = source.begin_read(asked)
        if refusal:
            return ReadOutcome(error=refusal)
        try:
            for block, target in zip(asked.blocks, targets, strict=True):
                self._store.page(target)[:] = source.store.page(block.block_id)
        finally:
            source.end_read(asked.lease_id)
        fault = find_mismatch(self._store, asked.blocks, targets)
        num_bytes = 0 if fault else len(targets) * self._store.page_bytes
        return ReadOutcome(error=fault, is_damaged=bool(fault), num_bytes=num_bytes)

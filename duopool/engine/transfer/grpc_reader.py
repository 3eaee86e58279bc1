"""Reads pages as bytes on a gRPC stream: works between any two hosts and needs nothing of the memory.

A page is checked before it is copied, and copied by the thread that calls `done`: so when `done` runs, nothing writes
into the pages any more, and a page with a wrong digest is never written at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import BlockId
from duopool.engine.transfer.digest import mismatch
from duopool.engine.transfer.grpc_source import LAYOUT_METADATA_KEY
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source_client import SourceClient, describe_error
from duopool.engine.transfer.transport import ReadOutcome
from duopool.kernels import ops


class GrpcReader:
    """A `BlockReader` with a small thread pool; `num_threads` reads run at once, further ones queue."""

    def __init__(
        self,
        store: PageStore,
        *,
        client: SourceClient,
        read_timeout_s: float = 5.0,
        num_threads: int = 4,
    ) -> None:
        self._store = store
        self._read_timeout_s = read_timeout_s
        self._client = client
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grpc-reader")
        self._closed = False

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Pull `sources` into own pages `targets`. Raises RuntimeError once closed."""
        blocks = tuple(sources)
        asked = ReadBlocks(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, blocks=blocks)
        pages = [self._store.page(target) for target in targets]
        if len(pages) != len(blocks):
            raise ValueError(f"{len(blocks)} sources for {len(pages)} targets")
        if self._closed:
            raise RuntimeError("the reader is closed")
        self._threads.submit(lambda: done(self._pull(lease.source_address, asked, pages)))

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        """Ask for P's verdict, releasing the lease if it is good. Raises RuntimeError once closed."""
        asked = Validate(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, release=True)
        self._client.validate(lease.source_address, asked, done)

    def close(self) -> None:
        """End all reads (their `done` gets an error) and threads."""
        self._closed = True
        self._client.close()
        self._threads.shutdown(wait=True)

    def _pull(self, address: str, asked: ReadBlocks, pages: Sequence[memoryview]) -> ReadOutcome:
        try:
            call = self._client.read(address, asked, timeout_s=self._read_timeout_s)
        except RuntimeError as closed:
            return ReadOutcome(error=str(closed))
        try:
            layout = dict(call.initial_metadata()).get(LAYOUT_METADATA_KEY, self._store.digest)
            if layout != self._store.digest:
                return ReadOutcome(error=f"pages of layout {layout}, wanted {self._store.digest}")
            num_pages = 0
            for num_pages, page in enumerate(call, start=1):
                if num_pages > len(pages):
                    return ReadOutcome(error=f"the source sends more than {len(pages)} pages")
                fault = self._fault(asked.blocks[num_pages - 1], page)
                if fault:
                    return ReadOutcome(error=fault, is_damaged=True)
                pages[num_pages - 1][:] = page
        except grpc.RpcError:
            return ReadOutcome(error=describe_error(call))
        finally:
            call.cancel()
            self._client.forget(address, call)
        if num_pages != len(pages):
            return ReadOutcome(error=f"the source sent {num_pages} of {len(pages)} pages")
        return ReadOutcome(num_bytes=num_pages * self._store.page_bytes)

    def _fault(self, source: SealedBlock, page: bytes) -> str:
        if len(page) != self._store.page_bytes:
            return f"a page of {len(page)} bytes arrived, own pages have {self._store.page_bytes}"
        return mismatch(source, ops.crc32(page))

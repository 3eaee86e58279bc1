"""The host's side of a KV store on a device: where its pages are while they travel between workers.

    step ─▶ page on the device ── seal ──▶ page in the mirror, digested ─▶ transport
    transport ─▶ page in the mirror, digest checked ── upload ──▶ page on the device ─▶ step

Page b of the mirror stands for page b of the store; transports and digests know the mirror alone. Pages pass through a
little pinned memory, a stretch of many at a time: scattered ones are gathered before one copy and scattered behind it.
The mirror itself is as large as the store, and takes memory only for pages that have travelled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from duopool.core.messages import SealedBlock
from duopool.core.types import BlockId
from duopool.engine.kv_store import KVStore
from duopool.kernels import ops

STRETCH_BYTES = 32 << 20
"""Pinned memory for each direction: less than a millisecond on a bus of 50 GB/s."""


def mirror_of(store: KVStore) -> PageMirror | None:
    """None for a store whose pages lie in host memory themselves."""
    return None if store.pages.is_cpu else PageMirror(store)


class PageMirror:
    """Over a store on any device; on the CPU too, which is what tests do. Calls from any thread."""

    def __init__(self, store: KVStore) -> None:
        self.host = KVStore(store.layout, store.num_blocks, is_sparse=True)
        """The mirror's pages, for transports."""
        self._pages = store.pages
        self._device = store.pages.device
        self._stretch = max(1, min(STRETCH_BYTES // store.page_bytes, store.num_blocks))
        shape, is_cuda = (self._stretch, store.layout.page_elements), self._device.type == "cuda"
        self._leaving = torch.empty(shape, dtype=store.layout.dtype, pin_memory=is_cuda)
        self._coming = torch.empty(shape, dtype=store.layout.dtype, pin_memory=is_cuda)
        self._leaving_lock, self._coming_lock = threading.Lock(), threading.Lock()
        # Uploads do not stand in line between the kernels of a step: the pages they write belong to none yet.
        self._uploads = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]

    def seal(self, block_ids: Sequence[BlockId], generations: Sequence[int]) -> tuple[SealedBlock, ...]:
        """Bring pages to the host as all steps so far have left them, and name them as they are there."""
        with self._leaving_lock:
            digests = [digest for some in self._stretches(block_ids) for digest in self._download(some)]
        return tuple(map(SealedBlock, block_ids, generations, digests))

    def upload(self, block_ids: Sequence[BlockId]) -> None:
        """Bring pages to the device; when this returns they are there for every step that has not begun."""
        with self._coming_lock:
            for some in self._stretches(block_ids):
                self._upload(some)

    def _stretches(self, block_ids: Sequence[BlockId]) -> Iterator[Sequence[BlockId]]:
        return (block_ids[at : at + self._stretch] for at in range(0, len(block_ids), self._stretch))

    def _download(self, block_ids: Sequence[BlockId]) -> list[int]:
        """On the thread's own stream, where the steps are: behind those that have written the pages."""
        staged = self._leaving[: len(block_ids)]
        staged.copy_(self._pages.index_select(0, torch.tensor(block_ids, device=self._device)), non_blocking=True)
        if self._uploads is not None:
            torch.cuda.current_stream(self._device).synchronize()
        return ops.copy_pages(
            staged.data_ptr(),
            range(len(block_ids)),
            self.host.base_address,
            block_ids,
            page_bytes=self.host.page_bytes,
        )

    def _upload(self, block_ids: Sequence[BlockId]) -> None:
        staged = self._coming[: len(block_ids)]
        torch.index_select(self.host.pages, 0, torch.tensor(block_ids), out=staged)
        if self._uploads is None:
            self._pages.index_copy_(0, torch.tensor(block_ids), staged)
            return
        # A step that is under way may still write to pages of requests that have ended.
        self._uploads.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._uploads):
            where = torch.tensor(block_ids, device=self._device)
            self._pages.index_copy_(0, where, staged.to(self._device, non_blocking=True))
        self._uploads.synchronize()

"""What a transport needs of a KV store: pages as raw bytes, by block id."""

from __future__ import annotations

from typing import Protocol

from duopool.core.messages import SharedMemory
from duopool.core.types import BlockId


class PageStore(Protocol):
    """`num_blocks` pages of `page_bytes` bytes, one after the other from `base_address`."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    @property
    def base_address(self) -> int:
        """Address of page 0 in this process (or on its device)."""
        ...

    @property
    def shared_memory(self) -> SharedMemory | None:
        """Where other processes of this host find page 0; None if they cannot, as on a device."""
        ...

    @property
    def digest(self) -> str:
        """Names the layout of a page: equal for stores whose pages mean the same."""
        ...

    def page(self, block_id: BlockId) -> memoryview:
        """Writable view of one page's bytes, [page_bytes]."""
        ...

"""The memory of one worker's KV blocks: a page per block, all layers of a block in one contiguous page.

Owns bytes, not meaning: which block belongs to whom is the block pool's to know. One page is one transfer, one digest,
one copy; kernels reach a layer through strided views.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duopool.core.messages import SharedMemory
from duopool.engine import shared_memory
from duopool.engine.kv_layout import KVLayout


class KVStore:
    """`num_blocks` pages of one layout on one device. Fresh pages are zero.

    With `is_sparse` a store in host memory takes a page's memory when the page is first written.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu", *, is_sparse: bool = False
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"a KV store needs at least one block, got {num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.shared_memory: SharedMemory | None = None
        """Where other processes of this host find page 0; None on a device, and where there is no such memory."""
        self.pages: Tensor = self._allocate(torch.device(device), is_sparse=is_sparse)
        """[num_blocks, page_elements]"""
        self.layers = tuple(self._views())
        """Per layer strided views: keys [N, G, S, D] and values [N, G, S, E]."""
        self._bytes: NDArray[np.uint8] | None = None
        if self.pages.device.type == "cpu":
            self._bytes = self.pages.view(torch.uint8).numpy()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One of `layers`."""
        return self.layers[index]

    def page(self, block_id: int) -> memoryview:
        """The page's bytes, writable, in place; only for a store in host memory."""
        if self._bytes is None:
            raise ValueError(f"pages on {self.pages.device} have no host address")
        return memoryview(self._bytes[block_id])

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes

    @property
    def digest(self) -> str:
        """The layout's digest: pages move only between stores where it is the same."""
        return self.layout.digest

    @property
    def base_address(self) -> int:
        """Address of page 0; page b begins `b * page_bytes` behind it."""
        return self.pages.data_ptr()

    def _allocate(self, device: torch.device, *, is_sparse: bool) -> Tensor:
        """Zeroed pages, in memory that others may map where that can be had."""
        shape, dtype = (self.num_blocks, self.layout.page_elements), self.layout.dtype
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        shared = shared_memory.allocate(self.num_blocks * self.page_bytes, is_sparse=is_sparse)
        if shared is None:
            return torch.zeros(shape, dtype=dtype)
        memory, self.shared_memory = shared
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        size = self.layout.block_size
        views, offset = [], 0
        for shape in self.layout.layers:
            halves = []
            for dim in (shape.key_dim, shape.value_dim):
                width = shape.num_kv_heads * size * dim
                halves.append(self.pages[:, offset : offset + width].view(-1, shape.num_kv_heads, size, dim))
                offset += width
            views.append((halves[0], halves[1]))
        return views

"""The shape of a KV page: what one block of tokens takes over all layers.

Owns the arithmetic only; `kv_store.py` owns the memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one attention layer stores for one token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """A page holds, layer after layer, keys [G, S, D] and then values [G, S, E], back to back."""

    layers: tuple[LayerShape, ...]
    block_size: int
    """Tokens per page."""
    dtype: torch.dtype

    @property
    def page_elements(self) -> int:
        return self.block_size * sum(layer.num_elements for layer in self.layers)

    @property
    def page_bytes(self) -> int:
        return self.page_elements * self.dtype.itemsize

    @property
    def digest(self) -> str:
        """32 hex digits: equal exactly when pages of two stores may be exchanged byte for byte."""
        shapes = [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in self.layers]
        text = f"duopool-page-1:{self.dtype}:{self.block_size}:{shapes}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

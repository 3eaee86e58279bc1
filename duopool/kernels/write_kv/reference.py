"""Writing keys and values into their pages, in plain torch.

Owns the meaning of the op. Legend: T tokens, G kv heads, D key head dim, E value head dim, S block size.
"""

from __future__ import annotations

from torch import Tensor


def write_kv(key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """See `duopool.kernels.ops.write_kv`."""
    kept = slots_T >= 0
    if not bool(kept.all()):
        key_TGD, value_TGE, slots_T = key_TGD[kept], value_TGE[kept], slots_T[kept]
    block_size = key_cache.shape[2]
    block, offset = slots_T // block_size, slots_T % block_size
    key_cache[block, :, offset] = key_TGD.to(key_cache.dtype)
    value_cache[block, :, offset] = value_TGE.to(value_cache.dtype)

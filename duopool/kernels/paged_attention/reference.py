"""Paged attention in plain words, one request after the other, in float32.

Owns the meaning of the op; every other implementation is tested against this one. Legend: T query tokens, B requests,
H query heads, G kv heads, D key head dim, E value head dim, S block size, N blocks, M most blocks of a request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pages(cache_NGSD: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens behind a block table, as [G, length, D]."""
    pages_MGSD = cache_NGSD[blocks.long()]
    num_blocks, heads, block_size, dim = pages_MGSD.shape
    return pages_MGSD.transpose(0, 1).reshape(heads, num_blocks * block_size, dim)[:, :length]


def visible_keys(num_queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `length` keys each of the last `num_queries` positions sees, as bool [num_queries, length]."""
    position = torch.arange(length - num_queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    visible = key <= position
    return visible if window is None else visible & (key > position - window)


def paged_attention(
    q_THD: Tensor,
    key_cache_NGSD: Tensor,
    value_cache_NGSE: Tensor,
    block_tables_BM: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `duopool.kernels.ops.paged_attention`; all arithmetic in float32."""
    num_tokens, num_heads, _ = q_THD.shape
    _, kv_heads, block_size, value_dim = value_cache_NGSE.shape
    if out is None:
        out = q_THD.new_empty(num_tokens, num_heads, value_dim)
    starts = query_starts.tolist()
    for request, length in enumerate(kv_lengths.tolist()):
        first, last = starts[request], starts[request + 1]
        if first == last:
            continue
        blocks = block_tables_BM[request, : -(-length // block_size)]
        key = gather_pages(key_cache_NGSD, blocks, length).float().repeat_interleave(num_heads // kv_heads, dim=0)
        value = gather_pages(value_cache_NGSE, blocks, length).float().repeat_interleave(num_heads // kv_heads, dim=0)
        query = q_THD[first:last].float().transpose(0, 1)
        scores = scale * (query @ key.transpose(1, 2))
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        visible = visible_keys(last - first, length, window, q_THD.device)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks_H is not None:
            # A sink is one more key of that head with this score and a value of zero.
            sinks = sinks_H.float()[:, None, None].expand(num_heads, last - first, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length].nan_to_num(0.0)
        out[first:last] = (weights @ value).transpose(0, 1).to(out.dtype)
    return out

"""Paged attention by torch's own operators, for machines without the compiled kernels.

Owns no meaning (see reference.py): it gathers each request's pages and folds the query heads of one KV head into rows,
so that keys are never repeated per query head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from duopool.kernels.paged_attention.reference import gather_pages, visible_keys


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
    """See `duopool.kernels.ops.paged_attention`."""
    num_tokens, num_heads, key_dim = q_THD.shape
    _, kv_heads, block_size, value_dim = value_cache_NGSE.shape
    group = num_heads // kv_heads
    if out is None:
        out = q_THD.new_empty(num_tokens, num_heads, value_dim)
    starts = query_starts.tolist()
    for request, length in enumerate(kv_lengths.tolist()):
        first, last = starts[request], starts[request + 1]
        rows = last - first
        if rows == 0:
            continue
        blocks = block_tables_BM[request, : -(-length // block_size)]
        key = gather_pages(key_cache_NGSD, blocks, length)
        value = gather_pages(value_cache_NGSE, blocks, length)
        query = q_THD[first:last].view(rows, kv_heads, group, key_dim).permute(1, 2, 0, 3)
        folded = query.reshape(kv_heads, group * rows, key_dim)
        plain = rows == 1 and (window is None or window >= length)
        visible = None if plain else visible_keys(rows, length, window, q_THD.device).repeat(group, 1)
        if soft_cap is None and sinks_H is None:
            mixed = scaled_dot_product_attention(folded[None], key[None], value[None], visible, scale=scale)[0]
        else:
            scores = scale * (folded.float() @ key.float().transpose(1, 2))
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            if sinks_H is not None:
                sinks = sinks_H.float().view(kv_heads, group, 1).expand(-1, -1, rows).reshape(kv_heads, -1, 1)
                scores = torch.cat([scores, sinks], dim=-1)
            mixed = torch.softmax(scores, dim=-1)[..., :length] @ value.float()
        out[first:last] = (
            mixed.view(kv_heads, group, rows, value_dim).permute(2, 0, 1, 3).reshape(rows, num_heads, value_dim)
        )
    return out

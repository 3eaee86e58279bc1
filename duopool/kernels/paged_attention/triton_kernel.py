"""Paged attention on CUDA: one ragged kernel for prompt chunks and decode, its keys split when requests are few.

Owns the launch too. A "row" is one (query token, query head) of a KV head, so that the heads of a group read each key
once and even a single decode token fills a matrix product. Nothing here waits for the device: grids are upper bounds,
and programs without work return. The merging of split keys is the split-KV scheme of Flash-Decoding (Dao et al., 2023).

Legend: T query tokens, B requests, H query heads, G kv heads, D key head dim, E value head dim, S block size.
"""

# Kernels are typed by Triton itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KEYS_PER_SPLIT = 256
_MOST_SPLITS = 32


@triton.jit
def _find_request(tile_starts, num_requests, tile):
    """The request that owns row tile `tile`: the last one whose first tile is not behind it."""
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(tile_starts + middle) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(
    query,
    keys,
    values,
    block_tables,
    query_starts,
    kv_lengths,
    tile_starts,
    sinks,
    out,
    partial_mixed,
    partial_largest,
    partial_total,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    block_table_stride,
    out_token_stride,
    out_head_stride,
    num_tokens,
    num_requests,
    num_heads,
    scale,
    soft_cap,
    window,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if tile >= tl.load(tile_starts + num_requests):
        return
    request = _find_request(tile_starts, num_requests, tile)
    first_query = tl.load(query_starts + request)
    num_queries = tl.load(query_starts + request + 1) - first_query
    length = tl.load(kv_lengths + request)

    first_row = (tile - tl.load(tile_starts + request)) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    row_mask = rows < num_queries * GROUP
    token = (first_query + rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    position = length - num_queries + rows // GROUP

    key_columns = tl.arange(0, KEY_PAD)
    value_columns = tl.arange(0, VALUE_PAD)
    q = tl.load(
        query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + key_columns[None, :],
        mask=row_mask[:, None] & (key_columns[None, :] < KEY_DIM),
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)

    # Keys that any row of the tile sees, then this program's share of them, in whole key tiles.
    last_row = tl.minimum(first_row + ROWS, num_queries * GROUP) - 1
    end = length - num_queries + last_row // GROUP + 1
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - num_queries + first_row // GROUP + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    begin += split * share
    end = tl.minimum(end, begin + share)

    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        key_mask = key < end
        page = tl.load(block_tables + request * block_table_stride + key // BLOCK_SIZE, mask=key_mask, other=0)
        page = page.to(tl.int64)
        slot = key % BLOCK_SIZE
        k = tl.load(
            keys
            + page[None, :] * key_block_stride
            + kv_head * key_head_stride
            + slot[None, :] * key_slot_stride
            + key_columns[:, None],
            mask=key_mask[None, :] & (key_columns[:, None] < KEY_DIM),
            other=0.0,
        )
        v = tl.load(
            values
            + page[:, None] * value_block_stride
            + kv_head * value_head_stride
            + slot[:, None] * value_slot_stride
            + value_columns[None, :],
            mask=key_mask[:, None] & (value_columns[None, :] < VALUE_DIM),
            other=0.0,
        )
        if WIDEN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new_largest

    if SPLITS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=row_mask, other=0.0)
            most = tl.maximum(largest, sink)
            shrink = tl.exp(largest - most)
            total = total * shrink + tl.exp(sink - most)
            mixed = mixed * shrink[:, None]
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + token[:, None] * out_token_stride + head[:, None] * out_head_stride + value_columns[None, :],
            mixed.to(out.dtype.element_ty),
            mask=row_mask[:, None] & (value_columns[None, :] < VALUE_DIM),
        )
    else:
        place = (split * num_tokens + token) * num_heads + head
        tl.store(partial_largest + place, largest, mask=row_mask)
        tl.store(partial_total + place, total, mask=row_mask)
        tl.store(partial_mixed + place[:, None] * VALUE_PAD + value_columns[None, :], mixed, mask=row_mask[:, None])


@triton.jit
def _merge(
    partial_mixed,
    partial_largest,
    partial_total,
    sinks,
    out,
    out_token_stride,
    out_head_stride,
    num_tokens,
    num_heads,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, VALUE_PAD)
    place = (tl.arange(0, SPLITS) * num_tokens + token) * num_heads + head
    largest = tl.load(partial_largest + place)
    most = tl.max(largest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head)
        most = tl.maximum(most, sink)
    factors = tl.exp(largest - most)
    total = tl.sum(tl.load(partial_total + place) * factors, 0)
    if HAS_SINKS:
        total += tl.exp(sink - most)
    parts = tl.load(partial_mixed + place[:, None] * VALUE_PAD + columns[None, :])
    mixed = tl.sum(parts * factors[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + token * out_token_stride + head * out_head_stride + columns,
        mixed.to(out.dtype.element_ty),
        mask=columns < VALUE_DIM,
    )


def _num_splits(num_programs: int, most_keys: int, device: torch.device) -> int:
    """Splits (a power of two) that fill the device twice over without parts of fewer than `_KEYS_PER_SPLIT` keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(2 * processors // max(num_programs, 1), most_keys // _KEYS_PER_SPLIT, _MOST_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


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
    splits: int | None = None,
) -> Tensor:
    """See `duopool.kernels.ops.paged_attention`; `splits` (a power of two) overrides the choice of key splits.

    Indices are not checked: that would mean waiting for the device.
    """
    num_tokens, num_heads, key_dim = q_THD.shape
    _, kv_heads, block_size, value_dim = value_cache_NGSE.shape
    requests, device = kv_lengths.shape[0], q_THD.device
    if out is None:
        out = q_THD.new_empty(num_tokens, num_heads, value_dim)
    if num_tokens == 0:
        return out
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    group = num_heads // kv_heads
    rows = 64 if num_tokens * group >= 32 * requests else 16
    tiles = (query_starts.diff() * group + rows - 1) // rows
    tile_starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    torch.cumsum(tiles, 0, out=tile_starts[1:])
    most_tiles = num_tokens * group // rows + requests
    key_pad, value_pad = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    if splits is None:
        splits = _num_splits(most_tiles * kv_heads, block_tables_BM.shape[1] * block_size, device)
    num_parts = splits if splits > 1 else 0
    partial_mixed = torch.empty(num_parts, num_tokens, num_heads, value_pad, dtype=torch.float32, device=device)
    partial_largest, partial_total = torch.empty(
        2, num_parts, num_tokens, num_heads, dtype=torch.float32, device=device
    ).unbind(0)
    sinks = None if sinks_H is None else sinks_H.float().contiguous()
    _attend[(most_tiles, kv_heads, splits)](
        q_THD,
        key_cache_NGSD,
        value_cache_NGSE,
        block_tables_BM,
        query_starts,
        kv_lengths,
        tile_starts,
        sinks,
        out,
        partial_mixed,
        partial_largest,
        partial_total,
        *q_THD.stride()[:2],
        *key_cache_NGSD.stride()[:3],
        *value_cache_NGSE.stride()[:3],
        block_tables_BM.stride(0),
        *out.stride()[:2],
        num_tokens,
        requests,
        num_heads,
        scale,
        soft_cap or 1.0,
        window or 0,
        GROUP=group,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=key_pad,
        VALUE_PAD=value_pad,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        KEYS=64 if max(key_pad, value_pad) * q_THD.element_size() <= 256 else 32,
        SPLITS=splits,
        HAS_SINKS=sinks is not None,
        HAS_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        # The interpreter gets bfloat16 arithmetic wrong without saying so.
        WIDEN=_INTERPRETED or q_THD.dtype == torch.float32,
    )
    if splits > 1:
        _merge[(num_tokens, num_heads)](
            partial_mixed,
            partial_largest,
            partial_total,
            sinks,
            out,
            *out.stride()[:2],
            num_tokens,
            num_heads,
            VALUE_DIM=value_dim,
            VALUE_PAD=value_pad,
            SPLITS=splits,
            HAS_SINKS=sinks is not None,
        )
    return out

"""The call of the compiled paged attention: field for field the structure in attention_call.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads

_POINTER, _NUMBER, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        ("query", _POINTER),
        ("query_token_stride", _NUMBER),
        ("query_head_stride", _NUMBER),
        ("keys", _POINTER),
        ("key_block_stride", _NUMBER),
        ("key_head_stride", _NUMBER),
        ("key_slot_stride", _NUMBER),
        ("values", _POINTER),
        ("value_block_stride", _NUMBER),
        ("value_head_stride", _NUMBER),
        ("value_slot_stride", _NUMBER),
        ("block_tables", _POINTER),
        ("block_table_stride", _NUMBER),
        ("query_starts", _POINTER),
        ("kv_lengths", _POINTER),
        ("sinks", _POINTER),
        ("out", _POINTER),
        ("out_token_stride", _NUMBER),
        ("out_head_stride", _NUMBER),
        ("num_tokens", _NUMBER),
        ("num_requests", _NUMBER),
        ("num_heads", _NUMBER),
        ("num_kv_heads", _NUMBER),
        ("key_dim", _NUMBER),
        ("value_dim", _NUMBER),
        ("block_size", _NUMBER),
        ("num_blocks", _NUMBER),
        ("blocks_per_request", _NUMBER),
        ("window", _NUMBER),
        ("scale", _REAL),
        ("soft_cap", _REAL),
        ("isa", _FLAG),
        ("is_bfloat16", _FLAG),
        ("num_threads", _FLAG),
    )


_PROBLEMS = {
    1: "query_starts must rise from 0 to the number of query tokens",
    2: "a kv_length is shorter than its request's queries or longer than its block table",
    3: "a block table names a block outside the caches",
}


def paged_attention(
    cpu: CpuLibrary,
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
    """See `duopool.kernels.ops.paged_attention`; raises ValueError before anything is read or written."""
    num_tokens, num_heads, key_dim = q_THD.shape
    num_blocks, kv_heads, block_size, value_dim = value_cache_NGSE.shape
    if out is None:
        out = q_THD.new_empty(num_tokens, num_heads, value_dim)
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    sinks = None if sinks_H is None else sinks_H.to(torch.float32).contiguous()
    query_starts, kv_lengths = query_starts.contiguous(), kv_lengths.contiguous()
    call = _AttentionCall(
        q_THD.data_ptr(),
        *q_THD.stride()[:2],
        key_cache_NGSD.data_ptr(),
        *key_cache_NGSD.stride()[:3],
        value_cache_NGSE.data_ptr(),
        *value_cache_NGSE.stride()[:3],
        block_tables_BM.data_ptr(),
        block_tables_BM.stride(0),
        query_starts.data_ptr(),
        kv_lengths.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        *out.stride()[:2],
        num_tokens,
        kv_lengths.shape[0],
        num_heads,
        kv_heads,
        key_dim,
        value_dim,
        block_size,
        num_blocks,
        block_tables_BM.shape[1],
        window or 0,
        scale,
        soft_cap or 0.0,
        cpu.isa,
        q_THD.dtype == torch.bfloat16,
        num_threads(),
    )
    status = cpu.calls.duopool_paged_attention(ctypes.byref(call))
    if status:
        raise ValueError(_PROBLEMS[status])
    return out

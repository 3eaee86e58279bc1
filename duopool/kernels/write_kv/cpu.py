"""The call of the compiled `write_kv`: field for field the structure in cpu_write_kv.cpp."""

from __future__ import annotations

import ctypes

from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads

_POINTER, _NUMBER, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _WriteCall(ctypes.Structure):
    _fields_ = (
        ("key_source", _POINTER),
        ("value_source", _POINTER),
        ("key_token_stride", _NUMBER),
        ("value_token_stride", _NUMBER),
        ("key_source_head_stride", _NUMBER),
        ("value_source_head_stride", _NUMBER),
        ("key_cache", _POINTER),
        ("value_cache", _POINTER),
        ("key_block_stride", _NUMBER),
        ("value_block_stride", _NUMBER),
        ("key_head_stride", _NUMBER),
        ("value_head_stride", _NUMBER),
        ("key_slot_stride", _NUMBER),
        ("value_slot_stride", _NUMBER),
        ("key_dim", _NUMBER),
        ("value_dim", _NUMBER),
        ("slots", _POINTER),
        ("num_tokens", _NUMBER),
        ("num_kv_heads", _NUMBER),
        ("block_size", _NUMBER),
        ("num_blocks", _NUMBER),
        ("element_bytes", _FLAG),
        ("num_threads", _FLAG),
    )


def write_kv(
    cpu: CpuLibrary, key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor
) -> None:
    """See `duopool.kernels.ops.write_kv`; all tensors share one dtype, and the last dimensions are contiguous."""
    slots_T = slots_T.contiguous()
    num_blocks, kv_heads, block_size, key_dim = key_cache.shape
    key_strides, value_strides = key_cache.stride(), value_cache.stride()
    call = _WriteCall(
        key_TGD.data_ptr(),
        value_TGE.data_ptr(),
        key_TGD.stride(0),
        value_TGE.stride(0),
        key_TGD.stride(1),
        value_TGE.stride(1),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        key_strides[0],
        value_strides[0],
        key_strides[1],
        value_strides[1],
        key_strides[2],
        value_strides[2],
        key_dim,
        value_cache.shape[3],
        slots_T.data_ptr(),
        slots_T.shape[0],
        kv_heads,
        block_size,
        num_blocks,
        key_cache.element_size(),
        num_threads(),
    )
    if cpu.calls.duopool_write_kv(ctypes.byref(call)):
        raise ValueError(f"a slot lies behind the last of {num_blocks} blocks of {block_size}")

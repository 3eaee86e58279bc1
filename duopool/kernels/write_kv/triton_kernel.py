"""Writing keys and values into their pages on CUDA: one program per token and KV head. Slots are not checked there."""

# Kernels are typed by Triton itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write(
    keys,
    values,
    key_cache,
    value_cache,
    slots,
    key_token_stride,
    key_source_head_stride,
    value_token_stride,
    value_source_head_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    columns = tl.arange(0, KEY_PAD)
    key = tl.load(keys + token * key_token_stride + head * key_source_head_stride + columns, mask=columns < KEY_DIM)
    tl.store(
        key_cache + block * key_block_stride + head * key_head_stride + offset * key_slot_stride + columns,
        key,
        mask=columns < KEY_DIM,
    )
    columns = tl.arange(0, VALUE_PAD)
    value = tl.load(
        values + token * value_token_stride + head * value_source_head_stride + columns, mask=columns < VALUE_DIM
    )
    tl.store(
        value_cache + block * value_block_stride + head * value_head_stride + offset * value_slot_stride + columns,
        value,
        mask=columns < VALUE_DIM,
    )


def write_kv(key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """See `duopool.kernels.ops.write_kv`."""
    tokens, kv_heads, key_dim = key_TGD.shape
    value_dim = value_TGE.shape[2]
    if tokens == 0:
        return
    if key_TGD.stride(2) != 1:
        key_TGD = key_TGD.contiguous()
    if value_TGE.stride(2) != 1:
        value_TGE = value_TGE.contiguous()
    _write[(tokens, kv_heads)](
        key_TGD,
        value_TGE,
        key_cache,
        value_cache,
        slots_T.contiguous(),
        *key_TGD.stride()[:2],
        *value_TGE.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        BLOCK_SIZE=key_cache.shape[2],
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(value_dim),
    )

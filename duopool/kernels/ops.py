"""The kernels' only face: each op picks its implementation by where the tensors live.

Owns the contracts (shapes, dtypes, errors) and the choice. The implementations stand in one folder per op; Triton is
imported only when a CUDA tensor arrives.

Legend: T query tokens, B requests, H query heads, G kv heads, D key head dim, E value head dim, S block size, N blocks,
M most blocks of a request, X elements of a page, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.copy_blocks import reference as copy_blocks_reference
from duopool.kernels.cpu_library import library
from duopool.kernels.linear import cpu as linear_cpu
from duopool.kernels.linear.packed_weight import PackedWeight
from duopool.kernels.paged_attention import torch_fallback as attention_fallback
from duopool.kernels.write_kv import reference as write_kv_reference

__all__ = [
    "PackedWeight",
    "copy_blocks",
    "linear",
    "linear_is_worthwhile",
    "pack_weight",
    "paged_attention",
    "write_kv",
]


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
    """Causal attention of a ragged batch over paged keys and values, as [T, H, E].

    Request b owns queries `query_starts[b]:query_starts[b + 1]` (int32 [B + 1]); the i-th of its n queries stands at
    position `kv_lengths[b] - n + i` and sees the keys at positions up to its own, and with `window` only the last
    `window` of those. The key at position p lies in page `block_tables_BM[b, p // S]` (int32) at offset `p % S`.
    Scores are `scale * q.k`, then `soft_cap * tanh(score / soft_cap)`; `sinks_H` adds one score per head to the
    denominator alone. Prompt chunks and single decode tokens mix freely. Pages that no request names are never read.
    """
    return attention_fallback.paged_attention(
        q_THD,
        key_cache_NGSD,
        value_cache_NGSE,
        block_tables_BM,
        query_starts,
        kv_lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
        out=out,
    )


def write_kv(key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """Put token t's key and value at `slots_T[t]` (int64: `block_id * S + offset`; negative: nowhere)."""
    write_kv_reference.write_kv(key_TGD, value_TGE, key_cache, value_cache, slots_T)


def copy_blocks(pages_NX: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy page `sources[i]` onto page `targets[i]` (int64 [n]). A target is named once and is no source."""
    copy_blocks_reference.copy_blocks(pages_NX, sources, targets)


def linear_is_worthwhile(dtype: torch.dtype) -> bool:
    """Whether packed weights of `dtype` make linear layers on this machine's CPU faster than torch's own."""
    return linear_cpu.most_rows(dtype, library()) > 0


def pack_weight(weight: Tensor) -> PackedWeight:
    """Prepare a weight [out_features, in_features] for `linear`; keeps it as it is where torch's product is faster.

    Where the panels serve every call the result holds no reference to `weight`, so that its memory can be freed.
    """
    out_features, in_features = weight.shape
    cpu = library() if weight.device.type == "cpu" else None
    rows = linear_cpu.most_rows(weight.dtype, cpu)
    if cpu is None or rows == 0:
        return PackedWeight(
            out_features=out_features, in_features=in_features, most_rows=0, original=weight, panels=None
        )
    return linear_cpu.pack(weight, rows, cpu)


def linear(x_TK: Tensor, weight: PackedWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` as [T, out_features] in x's dtype (float32 or bfloat16); products are summed in float32.

    Raises ValueError when the shapes or dtypes do not fit.
    """
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x_TK, weight, bias)
    if x_TK.dim() != 2 or x_TK.shape[1] != weight.in_features:
        raise ValueError(f"x has shape {tuple(x_TK.shape)}, the weight takes [T, {weight.in_features}]")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype != x_TK.dtype):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, not [{weight.out_features}] {x_TK.dtype}")
    if x_TK.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x_TK.dtype}, not float32 or bfloat16")
    return linear_cpu.linear(x_TK, weight, bias)

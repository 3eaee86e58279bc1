"""Linear layers on the CPU: when the packed kernel pays, packing, and the call.

Owns the policy per machine; the arithmetic is C++ (cpu_linear.cpp) or torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from duopool.kernels.cpu_library import CpuLibrary, Isa, num_threads
from duopool.kernels.linear.packed_weight import PackedWeight

FEW_ROWS = 8
"""Up to here a linear layer waits for memory, and the packed kernel reads it faster than torch on every machine."""
ANY_ROWS = 1 << 62


def most_rows(dtype: torch.dtype, cpu: CpuLibrary | None) -> int:
    """Up to how many rows the packed kernel beats torch's own product for a weight of `dtype`; 0: never."""
    if cpu is None:
        return 0
    if dtype == torch.bfloat16:
        return FEW_ROWS if cpu.torch_has_bfloat16_tiles else ANY_ROWS
    # In float32 measured on AVX2 alone: ahead up to 128 rows, level beyond.
    return ANY_ROWS if dtype == torch.float32 and cpu.isa == Isa.AVX2 else 0


def pack(weight: Tensor, rows: int, cpu: CpuLibrary) -> PackedWeight:
    """Lay `weight` [out_features, in_features] out in panels that serve calls of up to `rows` rows."""
    out_features, in_features = weight.shape
    width = cpu.calls.duopool_panel_width(cpu.isa)
    source = weight.detach()
    if source.stride(1) != 1:
        source = source.contiguous()
    num_panels = -(-out_features // width)
    is_bfloat16 = source.dtype == torch.bfloat16
    if is_bfloat16:
        panels = torch.empty(num_panels, -(-in_features // 2), width, dtype=torch.int32)
    else:
        panels = source.new_empty(num_panels, in_features, width)
    cpu.calls.duopool_pack_weight(
        cpu.isa, is_bfloat16, source.data_ptr(), source.stride(0), out_features, in_features, panels.data_ptr()
    )
    original = None if rows == ANY_ROWS else weight
    return PackedWeight(
        out_features=out_features, in_features=in_features, most_rows=rows, original=original, panels=panels
    )


def pack_quantised(weight: Tensor, bits: int, cpu: CpuLibrary) -> Tensor:
    """`weight` rounded to 8 or 4 bits in groups of 32 inputs, as panels of bytes (byte_products.h)."""
    out_features, in_features = weight.shape
    num_panels = -(-out_features // cpu.calls.duopool_panel_width(cpu.isa))
    panels = torch.empty(
        num_panels, cpu.calls.duopool_quantised_panel_bytes(cpu.isa, bits, in_features), dtype=torch.uint8
    )
    source = weight.detach().float().contiguous()
    cpu.calls.duopool_pack_quantised(
        cpu.isa, bits, source.data_ptr(), in_features, out_features, in_features, panels.data_ptr()
    )
    return panels


def linear(cpu: CpuLibrary | None, x_TK: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """See `duopool.kernels.ops.linear`; x is on the CPU, and `cpu` is what the weight was packed for."""
    rows = x_TK.shape[0]
    if weight.panels is None or cpu is None or rows > weight.most_rows:
        if weight.original is None:
            raise ValueError("a weight without its original needs the compiled kernels")
        return torch_linear(x_TK, weight.original, bias)
    out = x_TK.new_empty(rows, weight.out_features)
    if rows == 0:
        return out
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    cpu.calls.duopool_linear(
        cpu.isa,
        x_TK.dtype == torch.bfloat16,
        weight.panels.dtype == torch.int32,
        x_TK.data_ptr(),
        x_TK.stride(0),
        rows,
        weight.panels.data_ptr(),
        weight.in_features,
        weight.out_features,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        weight.out_features,
        num_threads(),
    )
    return out

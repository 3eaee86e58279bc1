"""The call of the compiled `best_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def best_tokens(cpu: CpuLibrary, scores_RV: Tensor) -> tuple[Tensor, Tensor]:
    """See `duopool.kernels.ops.best_tokens`."""
    rows, size = scores_RV.shape
    if scores_RV.stride(1) != 1:
        scores_RV = scores_RV.contiguous()
    best, indices = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    cpu.calls.duopool_best_tokens(
        cpu.isa,
        scores_RV.data_ptr(),
        scores_RV.stride(0),
        rows,
        size,
        best.data_ptr(),
        indices.data_ptr(),
        num_threads(),
    )
    return best, indices

"""The call of the compiled `contenders`."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def contenders(
    cpu: CpuLibrary, scores_RV: Tensor, keys_R2: Tensor, marks_R: Tensor, *, capacity: int
) -> tuple[Tensor, Tensor]:
    """See `duopool.kernels.ops.contenders`."""
    rows, size = scores_RV.shape
    if scores_RV.stride(1) != 1:
        scores_RV = scores_RV.contiguous()
    indices = torch.zeros(rows, capacity, dtype=torch.int64)
    counts = torch.empty(rows, dtype=torch.int64)
    cpu.calls.duopool_contenders(
        cpu.isa,
        scores_RV.data_ptr(),
        scores_RV.stride(0),
        rows,
        size,
        keys_R2.data_ptr(),
        marks_R.data_ptr(),
        capacity,
        indices.data_ptr(),
        counts.data_ptr(),
        num_threads(),
    )
    return indices, counts

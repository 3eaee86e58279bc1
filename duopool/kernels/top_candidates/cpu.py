"""The compiled choice of candidates by itself: a part of `sample_tokens` that tests look at alone."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def top_candidates(
    cpu: CpuLibrary, scores_RV: Tensor, floors_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.py; the scores' last dimension is contiguous."""
    rows, size = scores_RV.shape
    best = torch.empty(rows, capacity)
    indices = torch.empty(rows, capacity, dtype=torch.int64)
    counts = torch.empty(rows, dtype=torch.int64)
    bounds = torch.empty(rows)
    cpu.calls.duopool_top_candidates(
        cpu.isa,
        scores_RV.data_ptr(),
        scores_RV.stride(0),
        rows,
        size,
        floors_R.data_ptr(),
        top_k_R.data_ptr(),
        top_p_R.data_ptr(),
        capacity,
        best.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        bounds.data_ptr(),
        num_threads(),
    )
    return best, indices, counts, bounds

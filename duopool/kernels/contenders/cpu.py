"""The compiled search for contenders by itself: a part of `sample_tokens` that tests look at alone."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def contenders(
    cpu: CpuLibrary, scores_RV: Tensor, keys_R2: Tensor, marks_R: Tensor, *, capacity: int
) -> tuple[Tensor, Tensor]:
    """Tokens whose score plus noise may be above a row's mark: (indices [R, capacity], counts [R]), int64.

    Whoever is above it is among them, and few others. Scores are float32, -inf never is one; noise is that of
    `sample_tokens/noise.py` under `keys_R2` (int32); `marks_R` is float32. Behind a row's indices stand zeros; a count
    above `capacity` means that some are missing.
    """
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

"""The call of the compiled `loud_indices`."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def loud_indices(
    cpu: CpuLibrary, keys_R2: Tensor, limits_R: Tensor, *, size: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """See `duopool.kernels.ops.loud_indices`."""
    rows = len(keys_R2)
    indices = torch.zeros(rows, capacity, dtype=torch.int64)
    counts = torch.empty(rows, dtype=torch.int64)
    cpu.calls.duopool_loud_indices(
        cpu.isa,
        keys_R2.data_ptr(),
        rows,
        size,
        limits_R.data_ptr(),
        capacity,
        indices.data_ptr(),
        counts.data_ptr(),
        num_threads(),
    )
    return indices, counts

"""The compiled search for a row's best token by itself: a part of `sample_tokens` that tests look at alone."""

from __future__ import annotations

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def best_tokens(cpu: CpuLibrary, scores_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of float32 scores and the first token that has it: (float32 [R], int64 [R]).

    The largest of a row with a NaN is NaN; its token is any.
    """
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

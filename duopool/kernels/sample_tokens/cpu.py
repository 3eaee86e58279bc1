"""The call of the compiled `sample_tokens`."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads
from duopool.kernels.sample_tokens.draw import Draw, Drawn


def sample_tokens(cpu: CpuLibrary, logits_RV: Tensor, draws: Sequence[Draw]) -> Drawn:
    """See `duopool.kernels.ops.sample_tokens`."""
    rows, size = logits_RV.shape
    row_stride, stride = logits_RV.stride()
    if stride != 1:
        return sample_tokens(cpu, logits_RV.contiguous(), draws)
    token_ids, best = array("q", bytes(8 * rows)), array("f", bytes(4 * rows))
    cpu.calls.duopool_sample_tokens(
        cpu.isa,
        logits_RV.data_ptr(),
        row_stride,
        rows,
        size,
        packed(draws),
        token_ids.buffer_info()[0],
        best.buffer_info()[0],
        num_threads(),
    )
    return Drawn(token_ids.tolist(), best.tolist())


def packed(draws: Sequence[Draw]) -> bytes:
    """As the kernels read them."""
    return struct.pack("3d3q" * len(draws), *chain.from_iterable(draws))

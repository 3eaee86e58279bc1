"""The call of the compiled `token_logprobs`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads
from duopool.kernels.token_logprobs.found import FoundLogprobs


def token_logprobs(
    cpu: CpuLibrary, logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
) -> FoundLogprobs:
    """See `duopool.kernels.ops.token_logprobs`."""
    row_stride, stride = logits_RV.stride()
    if stride != 1:
        return token_logprobs(cpu, logits_RV.contiguous(), rows, token_ids, num_top)
    count = len(rows)
    logprobs, ranks = array("f", bytes(4 * count)), array("q", bytes(8 * count))
    top_tokens, top_logprobs = array("q", bytes(8 * count * num_top)), array("f", bytes(4 * count * num_top))
    # Named, so that they live as long as the call.
    where, wanted = array("q", rows), array("q", token_ids)
    cpu.calls.duopool_token_logprobs(
        cpu.isa,
        logits_RV.data_ptr(),
        row_stride,
        logits_RV.shape[1],
        count,
        where.buffer_info()[0],
        wanted.buffer_info()[0],
        num_top,
        logprobs.buffer_info()[0],
        ranks.buffer_info()[0],
        top_tokens.buffer_info()[0],
        top_logprobs.buffer_info()[0],
        num_threads(),
    )
    return FoundLogprobs(logprobs.tolist(), ranks.tolist(), top_tokens.tolist(), top_logprobs.tolist())

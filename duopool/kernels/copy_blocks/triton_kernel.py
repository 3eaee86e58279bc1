"""Copying whole pages on CUDA: one program per page and stretch of it. Indices are not checked there."""

# Kernels are typed by Triton itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_STRETCH = 4096


@triton.jit
def _copy(pages, sources, targets, page_stride, page_elements, STRETCH: tl.constexpr):
    pair = tl.program_id(0)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    source = tl.load(sources + pair)
    target = tl.load(targets + pair)
    inside = columns < page_elements
    tl.store(pages + target * page_stride + columns, tl.load(pages + source * page_stride + columns, inside), inside)


def copy_blocks(pages_NX: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `duopool.kernels.ops.copy_blocks`; the pages' last dimension is contiguous."""
    if sources.shape[0] == 0:
        return
    elements = pages_NX.shape[1]
    grid = (sources.shape[0], triton.cdiv(elements, _STRETCH))
    _copy[grid](pages_NX, sources.contiguous(), targets.contiguous(), pages_NX.stride(0), elements, STRETCH=_STRETCH)

"""The call of the compiled `copy_blocks`."""

from __future__ import annotations

from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads


def copy_blocks(cpu: CpuLibrary, pages_NX: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `duopool.kernels.ops.copy_blocks`; the pages' last dimension is contiguous."""
    sources, targets = sources.contiguous(), targets.contiguous()
    num_pages, page_elements = pages_NX.shape
    element_bytes = pages_NX.element_size()
    failed = cpu.calls.duopool_copy_blocks(
        pages_NX.data_ptr(),
        num_pages,
        pages_NX.stride(0) * element_bytes,
        page_elements * element_bytes,
        sources.data_ptr(),
        targets.data_ptr(),
        sources.shape[0],
        num_threads(),
    )
    if failed:
        raise ValueError(f"a source or target is none of {num_pages} pages")

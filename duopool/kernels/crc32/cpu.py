"""The calls of the compiled `crc32` and `copy_pages`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duopool.kernels.cpu_library import CpuLibrary


def crc32(cpu: CpuLibrary, data: bytes | memoryview) -> int:
    """See `duopool.kernels.ops.crc32`."""
    flat = np.frombuffer(data, dtype=np.uint8)
    return int(cpu.calls.duopool_crc32(flat.ctypes.data, flat.size))


def copy_pages(
    cpu: CpuLibrary,
    source_address: int,
    sources: Sequence[int],
    target_address: int,
    targets: Sequence[int],
    *,
    page_bytes: int,
) -> list[int]:
    """See `duopool.kernels.ops.copy_pages`."""
    froms, tos = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    digests = np.empty(len(froms), dtype=np.uint32)
    cpu.calls.duopool_copy_pages(
        source_address,
        target_address,
        page_bytes,
        froms.ctypes.data,
        tos.ctypes.data,
        len(froms),
        digests.ctypes.data,
    )
    found: list[int] = digests.tolist()
    return found

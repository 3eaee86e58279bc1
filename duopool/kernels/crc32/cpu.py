"""The call of the compiled `crc32`."""

from __future__ import annotations

import numpy as np

from duopool.kernels.cpu_library import CpuLibrary


def crc32(cpu: CpuLibrary, data: bytes | memoryview) -> int:
    """See `duopool.kernels.ops.crc32`."""
    flat = np.frombuffer(data, dtype=np.uint8)
    return int(cpu.calls.duopool_crc32(flat.ctypes.data, flat.size))

"""Copying pages with their digests, in plain Python. Owns the meaning of the op; the digest alone is zlib's `crc32`."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence


def copy_pages(
    source_address: int, sources: Sequence[int], target_address: int, targets: Sequence[int], *, page_bytes: int
) -> list[int]:
    """See `duopool.kernels.ops.copy_pages`."""
    digests = []
    for source, target in zip(sources, targets, strict=True):
        copy = target_address + target * page_bytes
        ctypes.memmove(copy, source_address + source * page_bytes, page_bytes)
        digests.append(zlib.crc32((ctypes.c_uint8 * page_bytes).from_address(copy)))
    return digests

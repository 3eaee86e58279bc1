"""CRC-32 against zlib's, over all lengths around the widths of its loops and over odd addresses."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from duopool.kernels import ops

BYTES = np.random.default_rng(5).integers(0, 256, 100_000, dtype=np.uint8)


@pytest.mark.parametrize("offset", [0, 1, 13])
def test_every_length_gives_zlibs_value(offset: int) -> None:
    view = memoryview(BYTES)
    for length in [*range(1100), 4096, 65_535, 99_000]:
        assert ops.crc32(view[offset : offset + length]) == zlib.crc32(view[offset : offset + length])


def test_bytes_and_nothing_are_taken() -> None:
    assert ops.crc32(b"123456789") == 0xCBF43926
    assert ops.crc32(b"") == 0


def test_any_flipped_bit_changes_it() -> None:
    page = BYTES[:4096].copy()
    sealed = ops.crc32(memoryview(page))
    for bit in range(0, 8 * len(page), 37):
        page[bit // 8] ^= 1 << bit % 8
        assert ops.crc32(memoryview(page)) != sealed
        page[bit // 8] ^= 1 << bit % 8

"""CRC-32 against zlib's, alone and while pages are copied, over all lengths around the widths of its loops and over odd
addresses."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest

from duopool.kernels import ops
from duopool.kernels.crc32 import reference

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


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("copy_pages", [ops.copy_pages, reference.copy_pages])
def test_pages_are_copied_whole_with_the_digest_of_what_was_written(
    copy_pages: Callable[..., list[int]], offset: int
) -> None:
    sources, targets = [4, 0, 7], [1, 5, 0]
    for page_bytes in [*range(1, 8), 63, 64, 255, 256, 257, 511, 512, 769, 4096, 4097, 9984, 12_000]:
        pages = BYTES[offset : offset + 8 * page_bytes]
        room = np.random.default_rng(6).integers(0, 256, 70 + 6 * page_bytes, dtype=np.uint8)
        skipped = -room.ctypes.data % 64 + offset  # the compiled copy takes another way where pages are not aligned
        copies = room[skipped : skipped + 6 * page_bytes]
        expected = room.copy()
        for source, target in zip(sources, targets, strict=True):
            page = pages[source * page_bytes : (source + 1) * page_bytes]
            expected[skipped + target * page_bytes : skipped + (target + 1) * page_bytes] = page
        digests = copy_pages(pages.ctypes.data, sources, copies.ctypes.data, targets, page_bytes=page_bytes)
        np.testing.assert_array_equal(room, expected)
        assert digests == [zlib.crc32(pages[s * page_bytes : (s + 1) * page_bytes]) for s in sources]

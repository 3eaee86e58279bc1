"""The pool never takes more than its budget, a request of the told length always fits, and the notes hold the sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.config import CacheConfig
from duopool.core.errors import OutOfBlocks
from duopool.engine.kv_sizing import GIB, size_pool

SIZES = {"page_bytes": 360 << 10, "max_model_len": 8192, "memory_bytes": 24 * GIB}


@given(
    fraction=st.floats(0.01, 0.9),
    workers=st.integers(1, 64),
    page_bytes=st.integers(1 << 10, 1 << 24),
    block_size=st.integers(1, 256),
    max_model_len=st.integers(1, 1 << 20),
    memory_bytes=st.integers(GIB, 1 << 41),
)
def test_all_workers_together_stay_in_their_part_of_the_memory(
    fraction: float, workers: int, page_bytes: int, block_size: int, max_model_len: int, memory_bytes: int
) -> None:
    cache = CacheConfig(block_size=block_size, kv_memory_fraction=fraction, memory_share=1 / workers)
    try:
        size = size_pool(cache, page_bytes=page_bytes, max_model_len=max_model_len, memory_bytes=memory_bytes)
    except OutOfBlocks:
        assert memory_bytes * fraction / workers < page_bytes + 1
        return
    assert workers * size.num_blocks * page_bytes <= memory_bytes * fraction * 1.000001
    assert size.max_model_len == min(max_model_len, size.num_blocks * block_size)
    assert f"{size.num_blocks:,} blocks" in size.notes[0]
    assert (len(size.notes) == 2) is (size.max_model_len < max_model_len)


def test_blocks_count_before_bytes_and_bytes_before_the_share() -> None:
    both = CacheConfig(num_blocks=7, kv_cache_memory_bytes=GIB)
    assert size_pool(both, **SIZES).num_blocks == 7
    assert size_pool(CacheConfig(kv_cache_memory_bytes=GIB), **SIZES).num_blocks == GIB // (360 << 10)


def test_what_cannot_fit_is_lowered_with_a_note_that_says_from_what_to_what() -> None:
    size = size_pool(CacheConfig(num_blocks=100), **SIZES)
    assert size.max_model_len == 1600
    assert "from 8,192 to 1,600" in size.notes[1]


def test_memory_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(OutOfBlocks):
        size_pool(CacheConfig(), page_bytes=GIB, max_model_len=10, memory_bytes=GIB)

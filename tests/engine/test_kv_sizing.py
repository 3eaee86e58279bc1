"""The pool never takes more than its budget, a request of the told length always fits, and the notes hold the sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.config import CacheConfig
from duopool.core.errors import OutOfBlocks
from duopool.engine.device import DeviceMemory
from duopool.engine.kv_sizing import (
    CUDA_CONTEXT_BYTES,
    GIB,
    MIRROR_FRACTION,
    PoolSize,
    Room,
    device_room,
    host_room,
    size_pool,
)

PAGE_BYTES = 360 << 10


def size(cache: CacheConfig, *, page_bytes: int = PAGE_BYTES, num_bytes: int = GIB) -> PoolSize:
    return size_pool(cache, page_bytes=page_bytes, max_model_len=8192, room=Room(num_bytes=num_bytes, why="so it is"))


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
        room = host_room(cache, memory_bytes=memory_bytes)
        size = size_pool(cache, page_bytes=page_bytes, max_model_len=max_model_len, room=room)
    except OutOfBlocks:
        assert memory_bytes * fraction / workers < page_bytes + 1
        return
    assert workers * size.num_blocks * page_bytes <= memory_bytes * fraction * 1.000001
    assert size.max_model_len == min(max_model_len, size.num_blocks * block_size)
    assert f"{size.num_blocks:,} blocks" in size.notes[0]
    assert (len(size.notes) == 2) is (size.max_model_len < max_model_len)


def test_blocks_count_before_bytes_and_bytes_before_the_share() -> None:
    both = CacheConfig(num_blocks=7, kv_cache_memory_bytes=GIB)
    assert size(both, num_bytes=9 * GIB).num_blocks == 7
    assert size(CacheConfig(kv_cache_memory_bytes=GIB), num_bytes=9 * GIB).num_blocks == GIB // PAGE_BYTES
    assert size(CacheConfig(), num_bytes=9 * GIB).num_blocks == 9 * GIB // PAGE_BYTES


def test_what_cannot_fit_is_lowered_with_a_note_that_says_from_what_to_what() -> None:
    lowered = size(CacheConfig(num_blocks=100))
    assert lowered.max_model_len == 1600
    assert "from 8,192 to 1,600" in lowered.notes[1]


def test_memory_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(OutOfBlocks):
        size(CacheConfig(), page_bytes=GIB + 1)
    with pytest.raises(OutOfBlocks):
        size(CacheConfig(), num_bytes=-GIB)


@given(
    utilization=st.floats(0.1, 1),
    workers=st.integers(1, 8),
    total=st.integers(4 * GIB, 200 * GIB),
    host_bytes=st.integers(GIB, 2048 * GIB),
    data=st.data(),
)
def test_workers_of_one_device_leave_it_what_was_not_asked_for_and_their_copies_fit_the_host(
    utilization: float, workers: int, total: int, host_bytes: int, data: st.DataObject
) -> None:
    """Started one after the other, each with weights of its own."""
    share = 1 / workers
    cache = CacheConfig(gpu_memory_utilization=utilization, gpu_share=share, memory_share=share)
    taken = copies = 0
    for _ in range(workers):
        weights = data.draw(st.integers(0, int(total * share)))
        taken += weights + CUDA_CONTEXT_BYTES
        memory = DeviceMemory(total=total, free=max(0, total - taken), own=weights)
        room = max(0, device_room(cache, memory, host_bytes=host_bytes).num_bytes)
        assert not room or room + weights + CUDA_CONTEXT_BYTES <= total * utilization * share + 1
        assert room <= memory.free * utilization
        taken, copies = taken + room, copies + room
    assert copies <= host_bytes * MIRROR_FRACTION + workers


def test_the_tightest_of_the_bounds_is_told() -> None:
    memory = DeviceMemory(total=80 * GIB, free=79 * GIB, own=16 * GIB)
    assert "80.0 GiB of the device x 0.9 - 16.5 GiB" in device_room(CacheConfig(), memory, host_bytes=512 * GIB).why
    assert "64.0 GiB of the host" in device_room(CacheConfig(), memory, host_bytes=64 * GIB).why
    busy = DeviceMemory(total=80 * GIB, free=20 * GIB, own=16 * GIB)
    assert "20.0 GiB free on the device" in device_room(CacheConfig(), busy, host_bytes=512 * GIB).why

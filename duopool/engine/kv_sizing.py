"""How many KV blocks a worker gets, and what that means for the longest request: arithmetic that explains itself."""

from __future__ import annotations

from dataclasses import dataclass

from duopool.core.config import CacheConfig
from duopool.core.errors import OutOfBlocks
from duopool.engine.device import DeviceMemory

GIB = 1 << 30
CUDA_CONTEXT_BYTES = 512 << 20
"""What CUDA itself takes of a device for one process, kernels included."""
MIRROR_FRACTION = 0.5
"""Part of the host's memory that the host copies of all its workers' pages on devices may grow to (page_mirror.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """The pool and the lines that say why."""

    num_blocks: int
    max_model_len: int
    """What was wanted, or what fits if that is less."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that a pool may take if nobody says how much it should, and why so much."""

    num_bytes: int
    why: str


def host_room(cache: CacheConfig, *, memory_bytes: int) -> Room:
    """This worker's part of a host with `memory_bytes` in all."""
    workers = f" / {1 / cache.memory_share:.0f} workers" if cache.memory_share < 1 else ""
    return Room(
        num_bytes=int(memory_bytes * cache.kv_memory_fraction * cache.memory_share),
        why=f"{_size(memory_bytes)} of memory x {cache.kv_memory_fraction:g}{workers}",
    )


def device_room(cache: CacheConfig, memory: DeviceMemory, *, host_bytes: int) -> Room:
    """This worker's part of a device, less its weights; no more than is free, and than host copies of it fit the host.

    What `gpu_memory_utilization` leaves is for activations.
    """
    own = memory.own + CUDA_CONTEXT_BYTES
    part = cache.gpu_memory_utilization * cache.gpu_share
    budget = Room(
        num_bytes=int(memory.total * part) - own,
        why=f"{_size(memory.total)} of the device x {part:g} - {_size(own)} for the model",
    )
    free = Room(
        num_bytes=int(memory.free * cache.gpu_memory_utilization),
        why=f"{_size(memory.free)} free on the device x {cache.gpu_memory_utilization:g}",
    )
    mirror = Room(
        num_bytes=int(host_bytes * MIRROR_FRACTION * cache.memory_share),
        why=f"{_size(host_bytes)} of the host for copies x {MIRROR_FRACTION:g} x {cache.memory_share:.2g}",
    )
    return min((budget, free, mirror), key=lambda room: room.num_bytes)


def size_pool(cache: CacheConfig, *, page_bytes: int, max_model_len: int, room: Room) -> PoolSize:
    """The pool of one worker: a number of blocks counts first, then a number of bytes, then `room`.

    Raises OutOfBlocks when not even one block fits.
    """
    if cache.num_blocks is not None:
        num_blocks, why = cache.num_blocks, f"{cache.num_blocks:,} blocks were asked for"
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // page_bytes
        why = f"{_size(cache.kv_cache_memory_bytes)} was asked for / {_size(page_bytes)} a block"
    else:
        num_blocks = room.num_bytes // page_bytes
        why = f"{room.why} / {_size(page_bytes)} a block"
    if num_blocks < 1:
        raise OutOfBlocks(needed=1, free=0)
    num_tokens = num_blocks * cache.block_size
    notes = [
        f"KV pool: {why} = {num_blocks:,} blocks of {cache.block_size} tokens ({_size(num_blocks * page_bytes)}), "
        f"room for {num_tokens:,} tokens"
    ]
    if num_tokens < max_model_len:
        notes.append(
            f"max-model-len lowered from {max_model_len:,} to {num_tokens:,}: a longer request would never fit"
        )
    return PoolSize(num_blocks=num_blocks, max_model_len=min(max_model_len, num_tokens), notes=tuple(notes))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / 1024:.1f} KiB"

"""How many KV blocks a worker gets, and what that means for the longest request: arithmetic that explains itself."""

from __future__ import annotations

from dataclasses import dataclass

from duopool.core.config import CacheConfig
from duopool.core.errors import OutOfBlocks

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """The pool and the lines that say why."""

    num_blocks: int
    max_model_len: int
    """What was wanted, or what fits if that is less."""
    notes: tuple[str, ...]


def size_pool(cache: CacheConfig, *, page_bytes: int, max_model_len: int, memory_bytes: int) -> PoolSize:
    """The pool of one worker. `memory_bytes` is what the host or the device has in all.

    A number of blocks counts first, then a number of bytes, then a share of the memory. Raises OutOfBlocks when not
    even one block fits.
    """
    if cache.num_blocks is not None:
        num_blocks, why = cache.num_blocks, f"{cache.num_blocks:,} blocks were asked for"
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // page_bytes
        why = f"{_size(cache.kv_cache_memory_bytes)} was asked for / {_size(page_bytes)} a block"
    else:
        num_blocks = int(memory_bytes * cache.kv_memory_fraction * cache.memory_share) // page_bytes
        workers = f" / {1 / cache.memory_share:.0f} workers" if cache.memory_share < 1 else ""
        why = f"{_size(memory_bytes)} of memory x {cache.kv_memory_fraction:g}{workers} / {_size(page_bytes)} a block"
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

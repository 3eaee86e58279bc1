"""Hit rate of the prefix cache on a trace: requests in order, one cache, each freed before the next comes.

    python benchmarks/prefix_trace.py TRACE.jsonl [CAPACITY ...]

A line of the trace has `hash_ids`, the names of the request's prefix blocks (the format of Mooncake's public traces).
Each name is fed to the KV manager as the one token of a block, so this runs the code that workers run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from duopool.core.errors import OutOfBlocks
from duopool.core.kv_manager import KVCacheManager
from duopool.core.types import RequestId


def hit_rate(requests: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of block references that were cached when their request came."""
    manager = KVCacheManager(num_blocks=capacity, block_size=1)
    request_id = RequestId("only")
    num_hits = num_blocks = 0
    for hash_ids in requests:
        num_hits += manager.admit(request_id, hash_ids)
        num_blocks += len(hash_ids)
        try:
            manager.reserve(request_id, len(hash_ids))
            manager.publish(request_id, len(hash_ids))
        except OutOfBlocks:
            pass  # longer than the whole cache: counts as a miss, leaves the cache as it is
        manager.free(request_id)
        manager.drain_events()
    manager.check()
    return num_hits / num_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefix cache hit rate on a trace.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("capacities", type=int, nargs="*", default=[1_000, 5_859, 10_000, 30_000, 50_000])
    arguments = parser.parse_args()
    with arguments.trace.open() as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    for capacity in arguments.capacities:
        start = time.perf_counter()
        rate = hit_rate(requests, capacity)
        print(f"{capacity:>7} blocks: {rate:7.2%} of blocks hit, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

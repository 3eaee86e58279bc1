"""Paged attention's share of a GPU's memory bandwidth: `python benchmarks/gpu.py [--batch 32] [--context 1024]`.

One call, no Ray. The bandwidth is that of copying a large tensor on the same device in the same run; pages of several
layers are cycled through, so that they come from memory. Decode steps are timed by events, medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import count

import torch

from duopool.kernels import ops

BLOCK, LAYERS = 16, 8
SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3-8b": (32, 8, 128)}
"""Query heads, KV heads, head dim."""


def median_s(call: Callable[[], object], runs: int) -> float:
    """Of `runs` calls behind a warm-up, by the device's own clock."""
    for _ in range(5):
        call()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth(runs: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source), runs)


def decode(shape: tuple[int, int, int], batch: int, context: int, runs: int) -> tuple[float, int]:
    """Seconds of one layer's decode attention, and the bytes of keys and values that it must read."""
    heads, kv_heads, dim = shape
    blocks = -(-context // BLOCK)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    pages = torch.randn(batch * blocks, LAYERS, 2, kv_heads, BLOCK, dim, **options)
    tables = torch.randperm(batch * blocks, device="cuda").view(batch, blocks).int()
    query = torch.randn(batch, heads, dim, **options)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    turn = count()

    def call() -> object:
        layer = next(turn) % LAYERS
        keys, values = pages[:, layer, 0], pages[:, layer, 1]
        return ops.paged_attention(query, keys, values, tables, starts, lengths, scale=dim**-0.5)

    return median_s(call, runs), 2 * batch * context * kv_heads * dim * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch sees none")
    peak = bandwidth(arguments.runs)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {peak / 1e9:.0f} GB/s")
    for name, shape in SHAPES.items():
        for batch in arguments.batch:
            for context in arguments.context:
                seconds, num_bytes = decode(shape, batch, context, arguments.runs)
                rate = num_bytes / seconds
                place = f"{name} decode, batch {batch}, context {context}"
                print(f"{place:<48}{seconds * 1e6:9.0f} us {rate / 1e9:7.0f} GB/s {rate / peak:6.1%} of the bandwidth")


if __name__ == "__main__":
    main()

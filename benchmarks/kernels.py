"""Our CPU kernels beside torch's own operators, by median time: `python benchmarks/kernels.py [PART ...]`.

Parts: bandwidth (decode attention beside reading as many bytes in order), attention, linear, sampling. Both sides take
turns, so that a busy machine slows both. Shapes are those of SmolLM2-135M (9 query heads, 3 KV heads, head dim 64,
hidden size 576). Weights and pages are cycled through, so that they come from memory, in huge pages as in a worker
unless THP_MEM_ALLOC_ENABLE=0 says otherwise.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import SampleSpec
from duopool.engine.sampler import sample
from duopool.kernels import ops
from duopool.kernels.cpu_library import library

HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 16
VOCABULARY = 49152
IN_A_ROW = 5
"""Calls of a side before the other's turn: the first one meets what the other has yet to write back."""


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    flops: float,
    num_bytes: float,
    whose: str = "torch",
) -> None:
    """Print medians of alternating calls."""
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    ours()
    theirs()
    while len(times[0]) < IN_A_ROW or (time.perf_counter() - started < 1.0 and len(times[0]) < 200):
        for side, call in ((0, ours), (1, theirs)):
            for _ in range(IN_A_ROW):
                before = time.perf_counter()
                call()
                times[side].append(time.perf_counter() - before)
    mine, other = statistics.median(times[0]), statistics.median(times[1])
    print(
        f"{name:<42}{mine * 1e6:>10.0f} us{flops / mine / 1e9:>8.1f} GFLOP/s{num_bytes / mine / 1e9:>7.1f} GB/s"
        f"{other * 1e6:>11.0f} us {whose}{other / mine:>8.2f} x",
        flush=True,
    )


def median_s(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Of nine calls, by this clock."""
    times = []
    for _ in range(9):
        before = clock()
        call()
        times.append(clock() - before)
    return statistics.median(times)


def bench_bandwidth() -> None:
    """The largest of as many numbers in a row as attention reads: the last column is its share of that speed."""
    numbers = torch.randint(1 << 30, (1 << 28,), dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        for requests, context in ((32, 256), (32, 1024), (4, 8192)):
            paged = Paged(dtype, requests, 1, context)
            pieces = cycle(numbers.split(paged.num_bytes // numbers.itemsize)[:-1])
            compare(paged.name, paged.ours, partial(_largest_of_next, pieces), paged.flops, paged.num_bytes, "in order")


def _largest_of_next(pieces: Iterator[torch.Tensor]) -> object:
    return next(pieces).max()


def bench_sampling() -> None:
    """Processor time of one thread, in milliseconds, for 1, 8 and 32 rows."""
    torch.set_num_threads(1)
    logits = torch.randn(32, VOCABULARY) * 3
    logits[:, :200] += torch.randn(32, 200).abs() * 6
    for name, params in {
        "greedy": SamplingParams(temperature=0),
        "greedy, 5 log-probabilities": SamplingParams(temperature=0, logprobs=5),
        "greedy, repetition penalty": SamplingParams(temperature=0, repetition_penalty=1.1),
        "temperature 0.8": SamplingParams(temperature=0.8, seed=1),
        "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
        "temperature 0.8, top-k 50": SamplingParams(temperature=0.8, top_k=50, seed=1),
        "temperature 5, top-p 0.99": SamplingParams(temperature=5, top_p=0.99, seed=1),
    }.items():
        medians = []
        for rows in (1, 8, 32):
            specs = [SampleSpec(params=params, prompt_token_ids=[1], output_token_ids=[2] * row) for row in range(rows)]
            medians.append(median_s(partial(sample, logits[:rows], specs), time.thread_time) * 1e3)
        print(f"sampling {name:<33}{'   '.join(f'{each:.2f}' for each in medians)} ms")


def bench_linear(dtype: torch.dtype) -> None:
    for out_features, in_features in ((576, 576), (1536, 576), (576, 1536), (49152, 576)):
        num_bytes = out_features * in_features * dtype.itemsize
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(max(1, int(1e8 / num_bytes)))]
        packed = [ops.pack_weight(weight) for weight in weights]
        for rows in (1, 8, 32, 256, 512):
            if rows * out_features > 4_000_000:
                continue
            x = torch.randn(rows, in_features).to(dtype)
            compare(
                f"linear {str(dtype)[6:]} {rows} x {in_features} -> {out_features}",
                partial(_each_in_turn, ops.linear, x, cycle(packed)),
                partial(_each_in_turn, linear, x, cycle(weights)),
                2.0 * rows * in_features * out_features,
                num_bytes,
            )


def _each_in_turn(call: Callable[..., object], x: torch.Tensor, weights: Iterator[object]) -> object:
    return call(x, next(weights))


class Paged:
    """Attention of `queries` last tokens of each request to `context`, over scattered pages of eight layers in turn."""

    def __init__(self, dtype: torch.dtype, requests: int, queries: int, context: int) -> None:
        self.name = f"attention {str(dtype)[6:]} {requests} x {queries} at {context}"
        self.flops = 4.0 * requests * queries * (context - (queries - 1) / 2) * HEADS * DIM
        self.num_bytes = 2 * requests * context * KV_HEADS * DIM * dtype.itemsize
        blocks = context // BLOCK
        self._sizes = requests, queries, context
        self._pages = torch.randn(requests * blocks, 8, 2, KV_HEADS, BLOCK, DIM).to(dtype)
        self._tables = torch.randperm(requests * blocks).view(requests, blocks).int()
        self._query = torch.randn(1, HEADS, requests * queries, DIM).to(dtype)
        self._starts = torch.arange(0, requests * queries + 1, queries, dtype=torch.int32)
        self._lengths = torch.full((requests,), context, dtype=torch.int32)
        position = torch.arange(context - queries, context)[:, None]
        self._mask = None if queries == 1 else torch.arange(context)[None] <= position
        self._layers = cycle(self._pages.unbind(1)), cycle(self._pages.unbind(1))

    def ours(self) -> object:
        """Out of the pages."""
        keys, values = next(self._layers[0]).unbind(1)
        query = self._query[0].transpose(0, 1)
        return ops.paged_attention(query, keys, values, self._tables, self._starts, self._lengths, scale=DIM**-0.5)

    def torchs(self) -> object:
        """Gathers the pages and calls torch's fused attention, as an eager paged model would."""
        requests, queries, context = self._sizes
        rows = self._query.view(HEADS, requests, queries, DIM).transpose(0, 1)
        key, value = (
            side[self._tables.long()].transpose(1, 2).reshape(requests, KV_HEADS, context, DIM)
            for side in next(self._layers[1]).unbind(1)
        )
        return scaled_dot_product_attention(rows, key, value, self._mask, scale=DIM**-0.5, enable_gqa=True)


def bench_attention(dtype: torch.dtype, requests: int, queries: int, context: int) -> None:
    paged = Paged(dtype, requests, queries, context)
    compare(paged.name, paged.ours, paged.torchs, paged.flops, paged.num_bytes)


def main() -> None:
    """Run the parts named on the command line, or all."""
    torch.manual_seed(0)
    parts = sys.argv[1:] or ["bandwidth", "attention", "linear", "sampling"]
    cpu = library()
    print(f"{cpu.isa.name.lower() if cpu else 'torch only'}, {torch.get_num_threads()} threads")
    if "bandwidth" in parts:
        bench_bandwidth()
    for dtype in (torch.bfloat16, torch.float32):
        if "attention" in parts:
            for requests, queries, context in (
                (32, 1, 256),
                (32, 1, 1024),
                (1, 1, 4096),
                (4, 1, 8192),
                (1, 512, 512),
                (4, 128, 1024),
            ):
                bench_attention(dtype, requests, queries, context)
        if "linear" in parts:
            bench_linear(dtype)
    if "sampling" in parts:
        bench_sampling()


if __name__ == "__main__":
    main()

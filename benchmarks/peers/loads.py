"""What the systems are asked, and what is measured of it. Prompts come from `duopool bench`'s workloads.

`streams`: 8 short prompts decode, first alone, then while prompts of 1,500 tokens keep arriving one behind the other.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from peers.streams import Endpoint, Request, Stream, send, send_all

from duopool.cluster.measure import percentile
from duopool.cluster.workloads import bursts, warm_up

WORKLOADS = ("single", "c8", "c32", "streams", "prefix")
STREAM_TOKENS = 160
LONG_PROMPT = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One burst. Times in milliseconds."""

    ttft_p50: float
    itl_p50: float
    itl_p99: float
    tokens_per_s: float
    seconds: float


async def run(endpoint: Endpoint, workload: str, number: int) -> dict[str, Measurement]:
    """One run of a workload: burst name -> measurement. Raises ValueError when a stream fails."""
    if workload == "streams":
        return await _streams(endpoint, number)
    found = {}
    for burst in bursts(workload, run=number):
        salt = f"{workload} {number}"
        requests = [
            Request(token_ids=each.token_ids.ids, max_tokens=each.sampling.max_tokens, salt=salt)
            for each in burst.requests
        ]
        found[burst.name] = measure(await send_all(endpoint, requests))
    return found


async def warm(endpoint: Endpoint) -> None:
    """Twice: what is compiled or allocated at first use is then there."""
    for times in range(2):
        requests = [
            Request(token_ids=each.token_ids.ids, max_tokens=each.sampling.max_tokens, salt=f"warm {times}")
            for each in warm_up().requests
        ]
        await send_all(endpoint, requests)


async def _streams(endpoint: Endpoint, number: int) -> dict[str, Measurement]:
    random = Random(f"streams {number}")

    def prompts(count: int, length: int, tokens: int) -> list[Request]:
        return [
            Request(token_ids=[random.randint(100, 30_000) for _ in range(length)], max_tokens=tokens, salt=str(number))
            for _ in range(count)
        ]

    idle = await send_all(endpoint, prompts(8, 64, STREAM_TOKENS))
    long_prompts = prompts(200, LONG_PROMPT, 2)
    streams = asyncio.ensure_future(send_all(endpoint, prompts(8, 64, STREAM_TOKENS)))
    num_long = 0
    while not streams.done():
        one = asyncio.ensure_future(send(endpoint, long_prompts[num_long % len(long_prompts)]))
        await asyncio.wait([one, streams], return_when=asyncio.FIRST_COMPLETED)
        num_long += one.done()
        if not one.done():
            one.cancel()
            await asyncio.wait([one])
    found = {"streams, idle": measure(idle), "streams, prompts arriving": measure(await streams)}
    print(f"    {num_long} long prompts were answered meanwhile", flush=True)
    return found


def measure(streams: Sequence[Stream]) -> Measurement:
    """Of a burst. Gaps are between events: what a client sees. Tokens are what was asked for, and all were given."""
    arrivals = [stream.arrivals for stream in streams]
    gaps = [later - earlier for times in arrivals for earlier, later in pairwise(times)]
    seconds = max(times[-1] for times in arrivals) - min(stream.sent_at for stream in streams)
    first = [times[0] - stream.sent_at for stream, times in zip(streams, arrivals, strict=True)]
    return Measurement(
        ttft_p50=1e3 * statistics.median(first),
        itl_p50=1e3 * percentile(gaps, 50),
        itl_p99=1e3 * percentile(gaps, 99),
        tokens_per_s=sum(stream.request.max_tokens for stream in streams) / seconds,
        seconds=seconds,
    )


def median_of(runs: Sequence[Measurement]) -> Measurement:
    return Measurement(
        **{name: statistics.median(getattr(each, name) for each in runs) for name in Measurement.__slots__}
    )

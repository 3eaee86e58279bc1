"""Goodput far past capacity: an open-loop client offers ten times what the system can finish.

    python benchmarks/overload.py [--seconds 60] [--times 10] [--model smollm2]

Goodput counts requests that finish before their deadline. Capacity is looked for at several offered loads; the best
goodput of them is the peak. Arrivals are Poisson and never wait for answers. Refusals must be RESOURCE_EXHAUSTED with
RetryInfo. Exit code 1 if goodput under overload is below 90 % of the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
from own_system import add_options, own_system

from duopool.cluster.admin_access import admin_stub
from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc
from duopool.proto.status import read_status

LEAST_SHARE = 0.9
SETTLE_S = 8.0
SEARCHED = (0.7, 1.0, 1.4)
"""Offered loads, against a first guess of the capacity, among which the peak is looked for."""


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one load."""

    num_offered: int = 0
    good_at: list[float] = field(default_factory=list)
    """When requests finished in time, in seconds from the beginning."""
    ends: Counter[str] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)
    """From sending a request to its refusal."""
    num_without_retry_info: int = 0
    began_at: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    """Until the last arrival."""

    @property
    def goodput(self) -> float:
        """Requests per second that finished in time, once the load had settled and before it ended."""
        return sum(SETTLE_S <= at <= self.took_s for at in self.good_at) / (self.took_s - SETTLE_S)

    def __str__(self) -> str:
        refused = ""
        if self.refusals_s:
            place = max(0, -(-99 * len(self.refusals_s) // 100) - 1)
            p50, p99 = statistics.median(self.refusals_s), sorted(self.refusals_s)[place]
            refused = f", refused after p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms"
        offered = self.num_offered / self.took_s
        return f"offered {offered:.1f}/s, goodput {self.goodput:.2f}/s, {dict(self.ends)}{refused}"


class Client:
    """Sends the same kind of request again and again."""

    def __init__(self, stub: Any, arguments: argparse.Namespace) -> None:
        self._stub = stub
        self._arguments = arguments
        self._random = Random(arguments.seed)

    async def closed_loop(self, num_streams: int, seconds: float) -> Outcome:
        """As many requests as streams, each followed by the next."""
        outcome = Outcome()

        async def stream() -> None:
            while time.monotonic() - outcome.began_at < seconds:
                await self._one(outcome, timeout_s=120.0)

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        outcome.took_s = time.monotonic() - outcome.began_at
        return outcome

    async def open_loop(self, rate: float, seconds: float) -> Outcome:
        """Requests at `rate` per second, whatever becomes of them."""
        outcome, due_s = Outcome(), 0.0
        tasks = set()
        while due_s < seconds:
            await asyncio.sleep(max(0.0, outcome.began_at + due_s - time.monotonic()))
            tasks.add(asyncio.create_task(self._one(outcome, timeout_s=self._arguments.deadline_s)))
            due_s += self._random.expovariate(rate)
        outcome.took_s = time.monotonic() - outcome.began_at
        await asyncio.gather(*tasks)
        return outcome

    async def _one(self, outcome: Outcome, *, timeout_s: float) -> None:
        outcome.num_offered += 1
        sent_at = time.monotonic()
        is_accepted = False
        try:
            async for response in self._stub.Generate(self._request(), timeout=timeout_s):
                is_accepted = True
                if response.HasField("finished"):
                    outcome.good_at.append(time.monotonic() - outcome.began_at)
                    outcome.ends["finished"] += 1
        except grpc.RpcError as error:
            status = read_status(error)
            is_refusal = status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            outcome.ends[
                "refused" if is_refusal else f"{status.code.name} {'begun' if is_accepted else 'waiting'}"
            ] += 1
            if is_refusal:
                outcome.refusals_s.append(time.monotonic() - sent_at)
                outcome.num_without_retry_info += status.retry_after_s is None

    def _request(self) -> pb.GenerateRequest:
        prompt = [self._random.randrange(3, 1000) for _ in range(self._arguments.prompt_tokens)]
        sampling = pb.SamplingParams(max_tokens=self._arguments.output_tokens, temperature=0, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


class Memory:
    """Highest resident memory of each process, asked for again and again."""

    def __init__(self, admin: Any) -> None:
        self.highest: dict[str, int] = {}
        self._admin = admin

    async def now(self) -> dict[str, int]:
        """MiB of each process."""
        audited = await asyncio.to_thread(self._admin.Audit, pb.AuditRequest(), timeout=20)
        return {process.name: process.resident_bytes >> 20 for process in audited.processes}

    async def watch(self) -> None:
        while True:
            for name, size in (await self.now()).items():
                self.highest[name] = max(size, self.highest.get(name, 0))
            await asyncio.sleep(1.0)


async def run(stub: Any, admin: Any, arguments: argparse.Namespace) -> bool:
    client, memory = Client(stub, arguments), Memory(admin)
    await client.closed_loop(8, 3.0)
    guess = (await client.closed_loop(arguments.streams, arguments.search_s)).goodput
    print(f"{arguments.streams} streams, each request after the other: {guess:.2f}/s", flush=True)
    outcomes = []
    for share in SEARCHED:
        outcomes.append(await client.open_loop(share * guess, arguments.search_s))
        print(outcomes[-1], flush=True)
    peak = max(outcome.goodput for outcome in outcomes)
    before = await memory.now()
    watch = asyncio.create_task(memory.watch())
    over = await client.open_loop(arguments.times * peak, arguments.seconds)
    watch.cancel()
    print(over)
    print(f"MiB before {before}, highest {memory.highest}")
    share = over.goodput / peak
    print(f"goodput at {arguments.times:.0f} times the peak load: {share:.0%} of the peak of {peak:.2f}/s")
    print(f"refusals without RetryInfo: {over.num_without_retry_info}")
    return share >= LEAST_SHARE and over.num_without_retry_info == 0


async def main_async(address: str, arguments: argparse.Namespace) -> bool:
    with admin_stub(address) as admin:
        async with grpc.aio.insecure_channel(address) as channel:
            return await run(inference_pb2_grpc.InferenceStub(channel), admin, arguments)  # type: ignore[no-untyped-call]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--times", type=float, default=10, help="offered load over peak goodput")
    parser.add_argument("--search-s", type=float, default=25, help="seconds of each load among which the peak is found")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--deadline-s", type=float, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    add_options(parser, model="smollm2")
    parser.set_defaults(max_num_seqs=32)
    arguments = parser.parse_args()
    with own_system(arguments) as address:
        return 0 if asyncio.run(main_async(address, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Goodput far past capacity: an open-loop client offers ten times what the system can finish.

    python benchmarks/overload.py [--seconds 60] [--times 10] [--model smollm2]

Goodput counts requests that finish before their deadline. Capacity is looked for at two offered loads; the better of
them is offered once more behind the overload, for a machine may be faster in one minute than in the next: the mean of
its two goodputs is the peak. Arrivals are Poisson and never wait for answers. Refusals must be RESOURCE_EXHAUSTED with
RetryInfo. The client is a process of its own, and says how late it was itself, and what share of the cores it and each
process of the system took: what ten times the requests cost it here, clients of a real system pay elsewhere, so goodput
is compared per core that it leaves too. Exit code 1 if goodput under overload is below 90 % of the peak as it stands.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import mean
from typing import Any

import grpc
import psutil
from own_system import add_options, own_system

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.measure import percentile
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import read_status

LEAST_SHARE = 0.9
SETTLE_S = 8.0
SEARCHED = (1.0, 1.3)
"""Offered loads, against a first guess of the capacity, among which the peak is looked for."""


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one load. Moments are in seconds from its beginning."""

    num_offered: int = 0
    good_at: list[float] = field(default_factory=list)
    """When requests finished in time."""
    ends: Counter[str] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)
    """From sending a request to its refusal."""
    errors: list[grpc.RpcError] = field(default_factory=list)
    """The refusals, to be read when there is time for it."""
    late_s: list[float] = field(default_factory=list)
    """How much later than its arrival the client sent each request."""
    busy_s: dict[str, float] = field(default_factory=dict)
    """Processor time of each process until the last arrival."""
    began_at: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    """Until the last arrival."""

    @property
    def goodput(self) -> float:
        """Requests per second that finished in time, once the load had settled and before it ended."""
        return sum(SETTLE_S <= at <= self.took_s for at in self.good_at) / (self.took_s - SETTLE_S)

    @property
    def per_core_left(self) -> float:
        """Goodput per core that the client did not take."""
        return self.goodput / (psutil.cpu_count() - self.busy_s["client"] / self.took_s)

    def __str__(self) -> str:
        lines = [
            f"offered {self.num_offered / self.took_s:.1f}/s, goodput {self.goodput:.2f}/s, {dict(self.ends)}",
            "cores: " + ", ".join(f"{name} {busy_s / self.took_s:.2f}" for name, busy_s in self.busy_s.items()),
        ]
        if self.late_s:
            lines.append(f"the client sent late by {spread(self.late_s)}")
        if self.refusals_s:
            lines.append(f"refused after {spread(self.refusals_s)}")
        return "\n    ".join(lines)


def spread(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and longest, in milliseconds."""
    p50, p99 = percentile(seconds, 50), percentile(seconds, 99)
    return f"p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, at most {max(seconds) * 1e3:.0f} ms"


class Processes:
    """The system's, and this one, as the operating system sees them."""

    def __init__(self, admin: Any) -> None:
        audited = admin.Audit(pb.AuditRequest(), timeout=20).processes
        self._processes = {"client": psutil.Process()} | {one.name: psutil.Process(one.pid) for one in audited}
        self.highest: dict[str, int] = {}
        """MiB of resident memory."""

    def busy_s(self) -> dict[str, float]:
        """Processor time so far; `others` is what everything else on this machine took."""
        busy_s = {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}
        machine = psutil.cpu_times()
        return busy_s | {"others": sum(machine) - machine.idle - machine.iowait - sum(busy_s.values())}

    def resident(self) -> dict[str, int]:
        """MiB of the system's processes."""
        return {name: one.memory_info().rss >> 20 for name, one in self._processes.items() if name != "client"}

    async def watch(self) -> None:
        while True:
            for name, size in self.resident().items():
                self.highest[name] = max(size, self.highest.get(name, 0))
            await asyncio.sleep(1.0)


class Client:
    """Sends the same kind of request again and again."""

    def __init__(self, channel: grpc.aio.Channel, processes: Processes, arguments: argparse.Namespace) -> None:
        self._generate = channel.unary_stream(
            "/duopool.v1.Inference/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        self._processes = processes
        self._arguments = arguments
        self._random = Random(arguments.seed)

    async def closed_loop(self, num_streams: int, seconds: float) -> Outcome:
        """As many requests as streams, each followed by the next."""
        outcome = Outcome()

        async def stream() -> None:
            while time.monotonic() - outcome.began_at < seconds:
                await self._one(outcome, self._request(), timeout_s=120.0)

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        outcome.took_s = time.monotonic() - outcome.began_at
        return outcome

    async def open_loop(self, rate: float, seconds: float) -> Outcome:
        """Requests at `rate` per second, whatever becomes of them."""
        arrivals = [self._random.expovariate(rate)]
        while arrivals[-1] < seconds:
            arrivals.append(arrivals[-1] + self._random.expovariate(rate))
        requests = [self._request() for _ in arrivals]
        before, outcome = self._processes.busy_s(), Outcome()
        tasks = []
        for due_s, request in zip(arrivals, requests, strict=True):
            await asyncio.sleep(max(0.0, outcome.began_at + due_s - time.monotonic()))
            outcome.late_s.append(time.monotonic() - outcome.began_at - due_s)
            tasks.append(asyncio.create_task(self._one(outcome, request, timeout_s=self._arguments.deadline_s)))
        outcome.took_s = time.monotonic() - outcome.began_at
        outcome.busy_s = {name: busy_s - before[name] for name, busy_s in self._processes.busy_s().items()}
        await asyncio.gather(*tasks)
        return outcome

    async def _one(self, outcome: Outcome, request: bytes, *, timeout_s: float) -> None:
        outcome.num_offered += 1
        sent_at = time.monotonic()
        is_accepted = False
        try:
            call = self._generate(request, timeout=timeout_s)
            while (response := await call.read()) is not grpc.aio.EOF:
                is_accepted = True
                if response.HasField("finished"):
                    outcome.good_at.append(time.monotonic() - outcome.began_at)
                    outcome.ends["finished"] += 1
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcome.ends["refused"] += 1
                outcome.refusals_s.append(time.monotonic() - sent_at)
                outcome.errors.append(error.with_traceback(None))
            else:
                outcome.ends[f"{error.code().name} {'begun' if is_accepted else 'waiting'}"] += 1

    def _request(self) -> bytes:
        """On the wire already: what making it costs is not to be taken from the system while it is measured."""
        prompt = [self._random.randrange(3, 1000) for _ in range(self._arguments.prompt_tokens)]
        sampling = pb.SamplingParams(max_tokens=self._arguments.output_tokens, temperature=0, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling).SerializeToString()


async def run(client: Client, processes: Processes, arguments: argparse.Namespace) -> bool:
    await client.closed_loop(8, 3.0)
    guess = (await client.closed_loop(arguments.streams, arguments.search_s / 2)).goodput
    print(f"{arguments.streams} streams, each request after the other: {guess:.2f}/s", flush=True)
    outcomes = {}
    for rate in [share * guess for share in SEARCHED]:
        outcomes[rate] = await client.open_loop(rate, arguments.search_s)
        print(outcomes[rate], flush=True)
    rate, first = max(outcomes.items(), key=lambda outcome: outcome[1].goodput)
    before = processes.resident()
    watch = asyncio.create_task(processes.watch())
    over = await client.open_loop(arguments.times * first.goodput, arguments.seconds)
    watch.cancel()
    print(over)
    print(f"MiB before {before}, highest {processes.highest}", flush=True)
    second = await client.open_loop(rate, arguments.search_s)
    print(second)
    peak, per_core_left = mean([first.goodput, second.goodput]), mean([first.per_core_left, second.per_core_left])
    share = over.goodput / peak
    print(f"goodput at {arguments.times:.0f} times the peak load: {share:.0%} of the peak of {peak:.2f}/s", end="; ")
    print(f"{over.per_core_left / per_core_left:.0%} per core that the client leaves")
    num_without = sum(read_status(error).retry_after_s is None for error in over.errors)
    print(f"refusals without RetryInfo: {num_without}")
    return share >= LEAST_SHARE and num_without == 0


async def main_async(address: str, arguments: argparse.Namespace) -> bool:
    with admin_stub(address) as admin:
        processes = Processes(admin)
        async with grpc.aio.insecure_channel(address) as channel:
            return await run(Client(channel, processes, arguments), processes, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--times", type=float, default=10, help="offered load over peak goodput")
    parser.add_argument("--search-s", type=float, default=25, help="seconds of each load among which the peak is found")
    parser.add_argument("--streams", type=int, default=48, help="that guess the capacity")
    parser.add_argument("--deadline-s", type=float, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    add_options(parser, model="smollm2")
    parser.set_defaults(max_num_seqs=32)
    arguments = parser.parse_args()
    if arguments.address is not None:
        return 0 if asyncio.run(main_async(arguments.address, arguments)) else 1
    with own_system(arguments) as address:
        return subprocess.run([sys.executable, __file__, *sys.argv[1:], "--address", address], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

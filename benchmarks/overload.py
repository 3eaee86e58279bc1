"""Goodput far past capacity: an open-loop client offers ten times what the system can finish.

    python benchmarks/overload.py [--seconds 60] [--times 10] [--model smollm2]

Goodput counts requests that finish before their deadline, as their tokens come. Capacity is looked for at two offered
loads; the better of them is offered once more behind the overload, for a machine may be faster in one minute than in
the next: the mean of its two goodputs is the peak. Arrivals are Poisson and never wait for answers. Refusals must be
RESOURCE_EXHAUSTED with RetryInfo. The client is a process of its own, and says how late it was itself, and what share
of the cores it and each process of the system took: what ten times the requests cost it here, clients of a real system
pay elsewhere, so goodput is compared per core that it leaves too. Exit code 1 if goodput under overload is below 90 %
of the peak as it stands.
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
from itertools import pairwise
from random import Random
from statistics import mean
from typing import Any

import grpc
import psutil
from bare_client import BareClient, Call
from own_system import add_options, own_system

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.measure import percentile
from duopool.proto import inference_pb2 as pb

LEAST_SHARE = 0.9
SETTLE_S = 8.0
PATIENCE_S = 120.0
"""Of requests that are to be finished whatever it takes."""
SEARCHED = (1.0, 1.4)
"""Offered loads, against a first guess of the capacity, among which the peak is looked for."""


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one load. Moments are in seconds from its beginning."""

    began_at: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    """Until the last arrival."""
    calls: list[Call] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    """How much later than its arrival the client sent each request."""
    busy_s: dict[str, float] = field(default_factory=dict)
    """Processor time of each process until the last arrival."""
    good: list[Call] = field(default_factory=list)
    """Those that finished in time."""
    ends: Counter[str] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)
    """From sending a request to its refusal."""
    num_without_retry: int = 0
    """Refusals that do not say when to come back."""

    def read(self, deadline_s: float) -> None:
        """Look at all answers."""
        for call in self.calls:
            status, took_s = call.status(), call.ended_at - call.sent_at
            if status is not None and status.code is grpc.StatusCode.OK and took_s <= deadline_s:
                self.ends["finished"] += 1
                self.good.append(call)
            elif status is not None and status.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.ends["refused"] += 1
                self.refusals_s.append(took_s)
                self.num_without_retry += status.retry_after_s is None
            else:
                name = "cut off" if status is None else status.code.name
                self.ends[f"{name} {'begun' if call.data_at else 'waiting'}"] += 1

    @property
    def goodput(self) -> float:
        """Requests per second that finish in time, once the load has settled and until it ends.

        A request counts as far as its data came then: whole batches finish together, and would fall in or out.
        """
        start, end = self.began_at + SETTLE_S, self.began_at + self.took_s
        return sum(mean(start <= at < end for at in call.data_at) for call in self.good) / (end - start)

    @property
    def per_core_left(self) -> float:
        """Goodput per core that the client did not take."""
        return self.goodput / (psutil.cpu_count() - self.busy_s["client"] / self.took_s)

    def __str__(self) -> str:
        lines = [
            f"offered {len(self.calls) / self.took_s:.1f}/s, goodput {self.goodput:.2f}/s, {dict(self.ends)}",
            "cores: " + ", ".join(f"{name} {busy_s / self.took_s:.2f}" for name, busy_s in self.busy_s.items()),
        ]
        if self.late_s:
            lines.append(f"the client sent late by {spread(self.late_s)}")
        if self.good:
            # What comes first only says where the request runs.
            firsts = [call.data_at[1] - call.sent_at for call in self.good]
            gaps = [later - earlier for call in self.good for earlier, later in pairwise(call.data_at[1:])]
            lines.append(f"finished: first token after {spread(firsts)}; then one every {spread(gaps)}")
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

    def __init__(self, client: BareClient, processes: Processes, arguments: argparse.Namespace) -> None:
        self._client = client
        self._processes = processes
        self._arguments = arguments
        self._random = Random(arguments.seed)

    async def closed_loop(self, num_streams: int, seconds: float) -> Outcome:
        """As many requests as streams, each followed by the next."""
        outcome = Outcome()

        async def stream() -> None:
            while time.monotonic() - outcome.began_at < seconds:
                outcome.calls.append(self._client.call(self._request(), timeout_s=PATIENCE_S))
                await self._client.ended(outcome.calls[-1])

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        outcome.took_s = seconds
        return await self._read(outcome, deadline_s=PATIENCE_S)

    async def open_loop(self, rate: float, seconds: float) -> Outcome:
        """Requests at `rate` per second, whatever becomes of them."""
        arrivals = [self._random.expovariate(rate)]
        while arrivals[-1] < seconds:
            arrivals.append(arrivals[-1] + self._random.expovariate(rate))
        # On the wire already: what making them costs is not to be taken from the system while it is measured.
        requests = [self._request() for _ in arrivals]
        before, outcome = self._processes.busy_s(), Outcome()
        for due_s, request in zip(arrivals, requests, strict=True):
            await asyncio.sleep(max(0.0, outcome.began_at + due_s - time.monotonic()))
            outcome.late_s.append(time.monotonic() - outcome.began_at - due_s)
            outcome.calls.append(self._client.call(request, timeout_s=self._arguments.deadline_s))
        outcome.took_s = time.monotonic() - outcome.began_at
        outcome.busy_s = {name: busy_s - before[name] for name, busy_s in self._processes.busy_s().items()}
        return await self._read(outcome, deadline_s=self._arguments.deadline_s)

    async def _read(self, outcome: Outcome, *, deadline_s: float) -> Outcome:
        async with asyncio.timeout(PATIENCE_S):
            for call in outcome.calls:
                await self._client.ended(call)
        self._client.read()
        outcome.read(deadline_s)
        return outcome

    def _request(self) -> bytes:
        prompt = [self._random.randrange(3, 1000) for _ in range(self._arguments.prompt_tokens)]
        sampling = pb.SamplingParams(max_tokens=self._arguments.output_tokens, temperature=0, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling).SerializeToString()


async def run(client: Client, processes: Processes, arguments: argparse.Namespace) -> bool:
    await client.closed_loop(8, 3.0)
    guess = (await client.closed_loop(arguments.streams, SETTLE_S + arguments.search_s / 3)).goodput
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
    print(f"refusals without RetryInfo: {over.num_without_retry}")
    return share >= LEAST_SHARE and over.num_without_retry == 0


async def main_async(address: str, arguments: argparse.Namespace) -> bool:
    with admin_stub(address) as admin:
        processes = Processes(admin)
        client = await BareClient.connect(address, "/duopool.v1.Inference/Generate")
        try:
            return await run(Client(client, processes, arguments), processes, arguments)
        finally:
            client.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--times", type=float, default=10, help="offered load over peak goodput")
    parser.add_argument("--search-s", type=float, default=25, help="seconds of each load among which the peak is found")
    parser.add_argument("--streams", type=int, default=96, help="that guess the capacity")
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

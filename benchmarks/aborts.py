"""Aborts requests at random phases, and proves with audits that nothing of them is left.

    python benchmarks/aborts.py [--requests 10000] [--model tiny] [--address HOST:PORT]

Cancels, deadlines, cut connections and killed routers, against a system of real processes: one of its own with a tiny
random model, or with `--model smollm2`, or a running one on this machine. While requests are aborted the system is
audited again and again; at the end it must be at rest within a second, and hold as many file descriptors, tasks and
streams as before. Exit code 1 if anything is found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from random import Random

import grpc
from abort_storm import Storm
from own_system import add_options, own_system

from duopool.cluster.admin_access import admin_stub
from duopool.proto import inference_pb2 as pb

ORPHAN_LIMIT_S = 8.0
"""The same after a router was killed: leases and orphans end by time."""
DRIFT_WAIT_S = 10.0
COUNTED = ("fds", "tasks", "streams")


class Failed(Exception):
    """A bar was missed."""


class Auditor:
    """Asks one router for audits."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.num_audits = 0

    async def audit(self, *, at_rest: bool = False) -> pb.AuditResponse:
        self.num_audits += 1
        return await asyncio.to_thread(self._audit, pb.AuditRequest(at_rest=at_rest))

    def _audit(self, request: pb.AuditRequest) -> pb.AuditResponse:
        with admin_stub(self._address) as admin:
            return admin.Audit(request, timeout=20)

    async def wait_for_rest(self, limit_s: float) -> float:
        """Seconds until nothing is held; Failed past the limit."""
        begin = time.monotonic()
        while True:
            with contextlib.suppress(grpc.RpcError):  # a killed router is coming back
                audited = await self.audit(at_rest=True)
                waited_s = time.monotonic() - begin
                if not audited.findings:
                    return waited_s
                if waited_s > limit_s:
                    raise Failed("\n".join(f"{one.where}: {one.subject} {one.problem}" for one in audited.findings))
            await asyncio.sleep(0.02)

    async def watch(self) -> None:
        """Audit a system under load, again and again; Failed at the first finding."""
        while True:
            audited = await self.audit()
            if audited.findings:
                raise Failed("\n".join(f"{one.where}: {one.subject} {one.problem}" for one in audited.findings))
            await asyncio.sleep(0.2)

    async def counts(self) -> dict[str, tuple[int, ...]]:
        """Per process what must not drift."""
        audited = await self.audit()
        return {one.name: tuple(getattr(one, name) for name in COUNTED) for one in audited.processes}

    async def router_pid(self) -> int:
        (router,) = [one for one in (await self.audit()).processes if one.role == "router"]
        return router.pid


async def run(address: str, arguments: argparse.Namespace) -> None:
    storm = Storm(address, Random(arguments.seed), max_prompt=arguments.max_prompt, max_tokens=arguments.max_tokens)
    auditor = Auditor(address)
    typical_s = await storm.learn(arguments.concurrency)
    print(f"{arguments.concurrency} requests at once take {typical_s:.2f} s")
    for turn in range(arguments.router_kills):
        await kill_router(storm, auditor, arguments.concurrency, typical_s)
        print(f"router killed {turn + 1} times, {storm.tally.num_aborted} aborted", flush=True)
    await storm.learn(arguments.concurrency)
    await auditor.wait_for_rest(ORPHAN_LIMIT_S)
    before = await auditor.counts()
    watch = asyncio.create_task(auditor.watch())
    begin = time.monotonic()
    await storm.abort(arguments.requests, concurrency=arguments.concurrency)
    took_s = time.monotonic() - begin
    if watch.done():
        watch.result()
    watch.cancel()
    rest_s = await auditor.wait_for_rest(arguments.rest_limit_s)
    after = await same_counts(auditor, before)
    tally = storm.tally
    print(f"{tally.num_aborted} aborted ({took_s:.0f} s without the kills): {dict(tally.ends)}, {dict(tally.phases)}")
    print(f"at rest {rest_s * 1e3:.0f} ms after the last; {auditor.num_audits} audits, no finding")
    print(f"{', '.join(COUNTED)} before: {before}\n{', '.join(COUNTED)} after:  {after}")


async def kill_router(storm: Storm, auditor: Auditor, num_requests: int, typical_s: float) -> None:
    """Kill it under a full load, and wait until its orphans are gone."""
    pid = await auditor.router_pid()
    held = asyncio.create_task(storm.hold(num_requests))
    await asyncio.sleep(Random(pid).uniform(0, typical_s))
    os.kill(pid, signal.SIGKILL)
    await held
    await asyncio.sleep(0.5)
    await auditor.wait_for_rest(ORPHAN_LIMIT_S)


async def same_counts(auditor: Auditor, before: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Counts once none is higher than before; Failed if one stays higher."""
    deadline = time.monotonic() + DRIFT_WAIT_S
    while True:
        after = await auditor.counts()
        if all(now <= then for name in before for now, then in zip(after[name], before[name], strict=True)):
            return after
        if time.monotonic() > deadline:
            raise Failed(f"{', '.join(COUNTED)} drift: before {before}, after {after}")
        await asyncio.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="aborted requests")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--router-kills", type=int, default=10)
    parser.add_argument("--rest-limit-s", type=float, default=1.0, help="from the last abort until nothing is held")
    parser.add_argument("--max-prompt", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    add_options(parser, model="tiny", decode=2)
    arguments = parser.parse_args()
    try:
        with own_system(arguments) as address:
            asyncio.run(run(address, arguments))
    except Failed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

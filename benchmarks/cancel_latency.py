"""How long a cancelled request keeps its blocks on the decode worker.

    python benchmarks/cancel_latency.py [--cancels 200] [--beside 4] [--model smollm2]

Beside some streams that go on, one after another starts and is cancelled at a random token; audits, each of which costs
some milliseconds, are asked until the decode worker no longer holds it. What is counted is the time from the cancel to
the arrival of that audit, less the step that was running: an upper bound. Exit code 1 if its p99 is over 50 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from random import Random
from typing import Any

import grpc
from own_system import add_options, own_system

from duopool.cluster.admin_access import admin_stub
from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc

LIMIT_S = 0.050


def request(random: Random, max_tokens: int) -> pb.GenerateRequest:
    prompt = [random.randrange(3, 1000) for _ in range(random.randint(20, 120))]
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


class Beside:
    """Streams that are read all the time, each begun again when it ends."""

    def __init__(self, stub: Any, count: int) -> None:
        self._stub = stub
        self._is_over = False
        self._calls: dict[int, Any] = {}
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over = True
        for call in list(self._calls.values()):
            call.cancel()
        for thread in self._threads:
            thread.join(10)

    def _run(self, number: int) -> None:
        random = Random(number)
        while not self._is_over:
            call = self._calls[number] = self._stub.Generate(request(random, 2000))
            try:
                for _ in call:
                    pass
            except grpc.RpcError:
                return


class Decode:
    """What the one decode worker holds."""

    def __init__(self, admin: Any) -> None:
        self._admin = admin

    def num_held(self) -> int:
        audited = self._admin.Audit(pb.AuditRequest(), timeout=10)
        (worker,) = [process for process in audited.processes if process.role == "decode"]
        return worker.requests + worker.quarantined

    def step_s(self) -> float:
        state = self._admin.ClusterState(pb.ClusterStateRequest(), timeout=10)
        return max(worker.step_s for worker in state.workers if worker.role == "decode")


def measure(stub: Any, decode: Decode, random: Random, num_beside: int) -> tuple[float, float]:
    """(seconds from the cancel until an audit showed that the worker holds the others only, duration of a step)."""
    call = stub.Generate(request(random, 400))
    at_token, num_tokens = random.randint(2, 6), 0
    for response in call:
        num_tokens += len(response.tokens.token_ids)
        if num_tokens >= at_token:
            break
    step_s = decode.step_s()
    cancelled_at = time.monotonic()
    call.cancel()
    while decode.num_held() > num_beside:
        pass
    return time.monotonic() - cancelled_at, max(step_s, decode.step_s())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--beside", type=int, default=4, help="streams that go on meanwhile")
    parser.add_argument("--seed", type=int, default=1)
    add_options(parser, model="smollm2")
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    with own_system(arguments) as address, admin_stub(address) as admin, grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        decode = Decode(admin)
        beside = Beside(stub, arguments.beside)
        beside.start()
        while decode.num_held() < arguments.beside:
            time.sleep(0.05)
        samples = []
        for number in range(arguments.cancels):
            samples.append(measure(stub, decode, random, arguments.beside))
            if number % 20 == 0:
                print(f"{number + 1} of {arguments.cancels}", flush=True)
        beside.stop()
    waits = sorted(whole_s for whole_s, _ in samples)
    beyond = sorted(whole_s - step_s for whole_s, step_s in samples)
    steps = statistics.median(step_s for _, step_s in samples)
    place = max(0, -(-99 * len(samples) // 100) - 1)
    print(f"{len(samples)} cancels beside {arguments.beside} streams, steps of {steps * 1e3:.0f} ms (median)")
    print(f"until freed: p50 {statistics.median(waits) * 1e3:.0f} ms, p99 {waits[place] * 1e3:.0f} ms")
    print(f"beyond one step: p50 {statistics.median(beyond) * 1e3:.0f} ms, p99 {beyond[place] * 1e3:.0f} ms")
    return 0 if beyond[place] <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())

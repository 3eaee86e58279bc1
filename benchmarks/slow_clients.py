"""Whether clients that do not read slow the others.

    python benchmarks/slow_clients.py [--others 100] [--measured 8] [--turns 6] [--seconds 5]

Some clients are measured while 100 others, in a process of their own, have streams at the same system: in one turn the
others read as fast as tokens come, in the next they stop reading after the first one. The measured clients' tokens per
second are compared, turn by turn. Exit code 1 if slow others cost more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections import Counter
from random import Random
from typing import Any

import grpc
from own_system import add_options, own_system

from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc
from duopool.proto.status import read_status

LEAST_RATIO = 0.95
SETTLE_S = 1.5
MAX_TOKENS = 4000


def request(random: Random) -> pb.GenerateRequest:
    prompt = [random.randrange(3, 1000) for _ in range(20)]
    sampling = pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


async def others(address: str, count: int, *, are_slow: bool) -> None:
    """Streams until the process is ended; says when all have begun."""
    num_begun = 0

    async def stream(stub: Any, random: Random) -> None:
        nonlocal num_begun
        call = stub.Generate(request(random))
        async for _ in call:
            num_begun += 1
            if num_begun == count:
                print("begun", flush=True)
            if are_slow:
                await asyncio.sleep(3600)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        await asyncio.gather(*(stream(stub, Random(number)) for number in range(count)), return_exceptions=True)
        await asyncio.sleep(3600)


async def measure(address: str, count: int, seconds: float) -> float:
    """Tokens per second that `count` clients get."""
    num_tokens = 0
    ends: Counter[str] = Counter()

    async def stream(stub: Any, random: Random) -> None:
        nonlocal num_tokens
        while True:
            try:
                async for response in stub.Generate(request(random)):
                    num_tokens += len(response.tokens.token_ids)
            except grpc.RpcError as error:
                ends[str(read_status(error).message)] += 1

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        tasks = [asyncio.create_task(stream(stub, Random(1000 + number))) for number in range(count)]
        await asyncio.sleep(SETTLE_S)
        before, begin = num_tokens, time.monotonic()
        await asyncio.sleep(seconds)
        rate = (num_tokens - before) / (time.monotonic() - begin)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not ends, ends
    return rate


def turn(address: str, arguments: argparse.Namespace, kind: str) -> float:
    """The measured clients' rate beside others of this kind."""
    command = [sys.executable, __file__, "--address", address, "--others", str(arguments.others), "--as", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            return asyncio.run(measure(address, arguments.measured, arguments.seconds))
        finally:
            child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", type=int, default=100)
    parser.add_argument("--measured", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6, help="of each kind")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--as", dest="kind", choices=("ordinary", "slow"), help="be the others (used by this command)")
    add_options(parser, model="tiny")
    parser.set_defaults(max_num_seqs=128, num_blocks=32_768)
    arguments = parser.parse_args()
    if arguments.kind is not None:
        asyncio.run(others(arguments.address, arguments.others, are_slow=arguments.kind == "slow"))
        return 0
    rates: dict[str, list[float]] = {"ordinary": [], "slow": []}
    with own_system(arguments, max_model_len=8192) as address:
        for number in range(2 * arguments.turns):
            kind = ("ordinary", "slow", "slow", "ordinary")[number % 4]
            rates[kind].append(turn(address, arguments, kind))
            print(f"{arguments.measured} clients beside {arguments.others} {kind} ones: {rates[kind][-1]:.0f} tokens/s")
    ratios = [slow / ordinary for slow, ordinary in zip(rates["slow"], rates["ordinary"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"beside slow ones {ratio:.2f} of the rate beside ordinary ones (pairs {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    return 0 if ratio >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())

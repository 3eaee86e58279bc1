"""Whether a system's processes grow while it serves: requests of every kind, for as long as you like.

    python benchmarks/soak.py [--minutes 10] [--model tiny|smollm2] [--concurrency 16]

Prints each process's private memory (USS, megabytes of 10^6 bytes) now and then, and at the end what it grew by in the
second half, in all and for each request. Prompts are new, so caches fill up in the first half and then turn over.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from random import Random
from typing import Any

import grpc
import psutil
from own_system import add_options, own_system

from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc

LOOKS = 20
PROCESSES = {
    "duopool.router.main": "router",
    "duopool.prefill_worker.process": "prefill",
    "duopool.decode_worker.process": "decode",
    "raylet": "raylet",
    "gcs_server": "gcs",
}


def some_request(random: Random) -> pb.GenerateRequest:
    """What people send, mixed: drawn or greedy, choices, penalties, biases, log-probabilities, guides, stops."""
    prompt = [random.randrange(3, 250) for _ in range(random.randint(1, 200))]
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt))
    sampling = request.sampling
    sampling.max_tokens, sampling.temperature = random.randint(1, 24), random.choice((0.0, 0.8))
    match random.randrange(8):
        case 0:
            sampling.n, sampling.temperature = 3, 1.0
        case 1:
            sampling.repetition_penalty, sampling.presence_penalty = 1.2, 0.5
        case 2:
            sampling.logit_bias[5] = 2.0
            sampling.min_tokens = 1
        case 3:
            sampling.logprobs = sampling.prompt_logprobs = 3
        case 4:
            request.guide.regex = f"[a-{random.choice('bcdefgh')}]{{1,{random.randint(2, 9)}}}"
        case 5:
            sampling.stop.extend(["zq", "the end"])
            sampling.top_p, sampling.top_k = 0.9, 20
        case 6:
            request.cache_salt = random.randbytes(4)
    return request


async def send(channel: Any, random: Random, ends: Counter[str]) -> None:
    """One request; one in five is cancelled after some messages, if it has so many; one in twenty is wrong."""
    request = some_request(random)
    if random.random() < 0.05:
        request.sampling.top_p = 7.0
    leave_after = random.randint(1, 12) if random.random() < 0.2 else None
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)  # type: ignore[no-untyped-call]
    count = 0
    try:
        async for _ in call:
            count += 1
            if count == leave_after:
                call.cancel()
        ends["finished"] += 1
    except grpc.RpcError as error:
        ends[error.code().name] += 1
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        ends["cancelled"] += 1


async def serve_for(address: str, seconds: float, concurrency: int, seed: int, ends: Counter[str]) -> None:
    deadline = time.monotonic() + seconds

    async def one_after_the_other(place: int) -> None:
        random = Random(f"{seed}:{place}")
        async with grpc.aio.insecure_channel(address) as channel:
            while time.monotonic() < deadline:
                await send(channel, random, ends)

    await asyncio.gather(*(one_after_the_other(place) for place in range(concurrency)))


def memory_mb() -> dict[str, float]:
    """By kind of process; several of a kind are added. A worker's nursery counts with it."""
    found: dict[str, float] = {"driver": psutil.Process().memory_full_info().uss / 1e6}
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            name = next((name for part, name in PROCESSES.items() if part in line), None)
            if name is not None:
                found[name] = found.get(name, 0.0) + process.memory_full_info().uss / 1e6
        except psutil.Error:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, model="tiny")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60 / LOOKS
    looks: list[tuple[int, dict[str, float]]] = []
    ends: Counter[str] = Counter()
    with own_system(arguments) as address:
        for seed in range(LOOKS):
            asyncio.run(serve_for(address, seconds, arguments.concurrency, seed, ends))
            looks.append((ends.total(), memory_mb()))
            told = "  ".join(f"{name} {size:.1f}" for name, size in looks[-1][1].items())
            print(f"{ends.total():>8} requests  {told}", flush=True)
    (before, first), (after, last) = looks[LOOKS // 2 - 1], looks[-1]
    print("ended:", ", ".join(f"{count} {name}" for name, count in ends.most_common()))
    for name, size in last.items():
        grown = size - first[name]
        each = grown / (after - before) * 1e6
        print(f"{name:>8} grew by {grown:+.1f} MB in the second half, {each:+.0f} bytes a request")


if __name__ == "__main__":
    main()

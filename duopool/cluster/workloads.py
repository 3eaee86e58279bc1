"""The benchmark's workloads: token-id prompts, greedy, past any end of sequence, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from duopool.proto import inference_pb2 as pb

FIRST_TOKEN, LAST_TOKEN = 100, 30_000
"""Range that prompts are drawn from: no special tokens, and inside every vocabulary that is worth measuring."""

WORKLOADS = ("single", "c8", "c32", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Requests that are sent at once and measured together."""

    name: str
    requests: tuple[pb.GenerateRequest, ...]


def bursts(workload: str, *, run: int) -> list[Burst]:
    """Bursts of one run of a workload, one after another. Every run has prompts (and a cache salt) of its own."""
    random = Random(f"{workload} {run}")
    salt = f"bench {workload} {run}".encode()
    match workload:
        case "single":
            return [_burst("single", [_ids(random, 512)], 128, salt)]
        case "c8" | "c32":
            count = int(workload[1:])
            return [_burst(workload, [_ids(random, random.randint(224, 288)) for _ in range(count)], 64, salt)]
        case "prefix":
            shared = _ids(random, 1024)
            return [
                _burst(f"prefix {name}", [shared + _ids(random, 64) for _ in range(16)], 16, salt)
                for name in ("first", "second")
            ]
        case _:
            raise ValueError(f"unknown workload {workload!r}")


def warm_up() -> Burst:
    """Touches the paths that are slow the first time: connections, thread pools, transfer."""
    random = Random("warm up")
    return _burst("warm up", [_ids(random, 200) for _ in range(4)], 16, b"bench warm up")


def _ids(random: Random, count: int) -> list[int]:
    return [random.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def _burst(name: str, prompts: Sequence[list[int]], max_tokens: int, salt: bytes) -> Burst:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Burst(
        name=name,
        requests=tuple(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, cache_salt=salt) for ids in prompts
        ),
    )

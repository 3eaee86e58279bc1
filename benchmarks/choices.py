"""Several choices of one prompt on one prefill and one decode worker: when the first and the last of them begin.

python benchmarks/choices.py --choices 8 --prompt-tokens 512
"""

from __future__ import annotations

import argparse
import statistics
import time
from random import Random

from duopool.client import Client
from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig
from duopool.proto import inference_pb2 as pb


def one_call(client: Client, prompt: list[int], choices: int, max_tokens: int) -> tuple[float, float, float]:
    """Seconds until the first choice has a token, until every one has, and until the end."""
    began, first = time.perf_counter(), dict[int, float]()
    for event in client.generate(token_ids=prompt, n=choices, max_tokens=max_tokens, seed=1, ignore_eos=True):
        if isinstance(event, pb.TokenChunk):
            first.setdefault(event.choice, time.perf_counter() - began)
    return min(first.values()), max(first.values()), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    random = Random(1)
    prompts = [[random.randrange(100, 40_000) for _ in range(given.prompt_tokens)] for _ in range(given.rounds + 1)]
    config = ClusterConfig(port=0, cache=CacheConfig(num_blocks=1200))
    with System.start(config) as system, Client(system.address) as client:
        calls = [one_call(client, prompt, given.choices, given.max_tokens) for prompt in prompts][1:]
    for name, times in zip(("first choice", "every choice", "whole call"), zip(*calls, strict=True), strict=True):
        print(
            f"{name:<13} {1e3 * statistics.median(times):6.0f} ms  ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})"
        )


if __name__ == "__main__":
    main()

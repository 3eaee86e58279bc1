"""The handoff in the running system, for each way that pages can travel: one prompt after the other.

    python benchmarks/handover.py [--prompt-tokens 960] [--rounds 30] [--transports auto nixl grpc]

transfer: the decode worker has a read of this request under way. handover: from the prefill worker's last listing to
the request's place in the decode batch, verdict included.
"""

from __future__ import annotations

import argparse
import statistics
from random import Random

from duopool.client import Client
from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, HandoffConfig
from duopool.engine.transfer.factory import available_transports
from duopool.proto import inference_pb2 as pb


def times_of(client: Client, prompt: list[int]) -> pb.StageTimes:
    """Of one request with a few tokens of output."""
    for event in client.generate(token_ids=prompt, max_tokens=4, temperature=0, ignore_eos=True):
        if isinstance(event, pb.Finished):
            return event.times
    raise RuntimeError("a stream ended without a last word")


def summary(seconds: list[float]) -> str:
    """Median and range."""
    return f"{1e3 * statistics.median(seconds):.2f} ms ({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--transports", nargs="+", default=available_transports())
    given = parser.parse_args()
    random = Random(1)
    for transport in given.transports:
        config = ClusterConfig(port=0, cache=CacheConfig(num_blocks=1200), handoff=HandoffConfig(transport=transport))
        with System.start(config) as system, Client(system.address) as client:
            prompts = [[random.randrange(100, 40_000) for _ in range(given.prompt_tokens)] for _ in range(given.rounds)]
            times = [times_of(client, prompt) for prompt in prompts][2:]
        transfer = summary([time.transfer_s for time in times])
        handover = summary([time.handover_s for time in times])
        size = f"{times[-1].transfer_blocks} blocks, {times[-1].transfer_bytes / 1e6:.1f} MB"
        print(f"{transport}: {size}: transfer {transfer}, handover {handover}", flush=True)


if __name__ == "__main__":
    main()

"""How long streams stand still when their decode worker drains: the production parts on virtual time, no other fault.

Steps take between half and one and a half of their mean time, messages about a millisecond. What the real machine adds
is measured by `make bench-drain`.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.sampling_params import SamplingParams
from duopool.proto import inference_pb2 as pb

from .client import Client
from .network import Network
from .scenario import FAST, SEEDS_APART, Ask, Drain, Planned, Scenario
from .simulation import Simulation

STEP_S = 0.05
DRAINED_AT = 1.3
NUM_STREAMS = 8
NUM_SEEDS = 12


def scenario(seed: int) -> Scenario:
    """Streams that began long before the drain and end long after it, over two decode workers."""
    return Scenario(
        seed=seed,
        timers=HandoffConfig(**FAST, local_prefill_max_tokens=0),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=16),
        routers=("router-0",),
        prefill=("prefill-0",),
        decode=("decode-0", "decode-1"),
        num_prefill_blocks=400,
        num_decode_blocks=400,
        step_s=STEP_S,
        one_sided=bool(seed % 2),
        has_digests=True,
        keeps_addresses=False,
        asks=tuple(
            Ask(
                at=0.3,
                prompt=tuple((7 * index + at) % 20 + 1 for at in range(5 + 6 * index)),
                params=SamplingParams(max_tokens=60, seed=SEEDS_APART * (64 + index), temperature=0.0, ignore_eos=True),
                salt=b"",
                timeout_s=None,
                cancel_after_s=None,
                cancel_after_tokens=None,
            )
            for index in range(NUM_STREAMS)
        ),
        plan=(Planned(when=DRAINED_AT, fault=Drain(place="decode-0")),),
    )


def test_a_moved_stream_stands_still_for_two_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: dict[int, list[float]] = defaultdict(list)
    homes: dict[int, list[str]] = defaultdict(list)
    take = Client._take

    def watch(client: Client, response: pb.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                homes[id(client)].append(response.started.decode_worker)
            case "tokens":
                arrivals[id(client)].append(client.network.time.now)
            case "finished":
                homes[id(client)].append(response.finished.decode_worker)
        take(client, response)

    def arrival(network: Network, source: str, target: str) -> float:
        return network.time.now + 0.0002 + 0.001 * network._random.random()

    monkeypatch.setattr(Client, "_take", watch)
    monkeypatch.setattr(Network, "arrival", arrival)
    pauses: list[float] = []
    for seed in range(NUM_SEEDS):
        simulation = Simulation(scenario(seed))
        outcome = simulation.run()
        assert outcome.breaches == ()
        assert set(outcome.endings) == {"finished"}
        for client in simulation.clients:
            begin, end = homes.pop(id(client))
            times = arrivals.pop(id(client))
            if begin != end:
                gaps = [later - earlier for earlier, later in pairwise(times) if later > DRAINED_AT]
                pauses.append(max(gaps) / STEP_S - 1)
    pauses.sort()
    print(f"{len(pauses)} moves, pause p50 {pauses[len(pauses) // 2]:.2f}, longest {pauses[-1]:.2f} steps")
    assert len(pauses) >= NUM_SEEDS * NUM_STREAMS // 3
    assert pauses[int(0.99 * len(pauses))] <= 2.0

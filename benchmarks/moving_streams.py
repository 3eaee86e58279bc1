"""Streams that are led from one decode worker to another while they run, and how long each stood still for it.

Owns one round: streams, a shrinking pool under them, the gaps between tokens. `drain.py` makes rounds and sums them up;
the end-to-end test makes one.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.completions import Completion, complete_all
from duopool.proto import inference_pb2 as pb

MIN_TOKENS_BEFORE = 24
"""Every stream has given so many tokens before its worker goes."""
TIMEOUT_S = 120.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One stream that changed its worker."""

    longest_gap_s: float
    """Longest time between two tokens while the worker drained: the move is one of these gaps."""
    step_s: float
    """Median time between two tokens of all streams of the round, before the drain: one decode step."""

    @property
    def gap_steps(self) -> float:
        return self.longest_gap_s / self.step_s

    @property
    def pause_steps(self) -> float:
        """Beyond the one step that every token takes."""
        return max(0.0, self.gap_steps - 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one drain did to the streams above it."""

    records: tuple[Completion, ...]
    moves: tuple[Move, ...]
    undisturbed: tuple[float, ...]
    """Longest gap of each stream in an equally long time before the drain, in steps: what noise alone does."""
    drain_s: float
    num_computed_prompts: int
    """Prompts of moved streams that some worker computed again; their KV should have moved along."""


def requests_of(num: int, *, prompt_tokens: int, max_tokens: int, seed: int) -> list[pb.GenerateRequest]:
    """Half of them greedy, half sampled with a seed."""
    random = Random(seed)
    return [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[random.randint(100, 30_000) for _ in range(prompt_tokens)]),
            sampling=pb.SamplingParams(
                max_tokens=max_tokens, temperature=float(at % 2), seed=at, top_p=0.95, ignore_eos=True
            ),
            cache_salt=b"moving %d" % seed,
        )
        for at in range(num)
    ]


def scale_decode(address: str, size: int) -> None:
    """Set the decode pool's size and wait for it."""
    with admin_stub(address) as admin:
        admin.Scale(pb.ScaleRequest(pools={"decode": size}), timeout=30)
        deadline = time.monotonic() + TIMEOUT_S
        while _decode_states(admin) != ["ready"] * size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the decode pool did not get to {size} workers")
            time.sleep(POLL_S)


def make_round(address: str, requests: Sequence[pb.GenerateRequest]) -> Round:
    """Run the requests over two decode workers, shrink the pool to one under them, and measure."""
    return asyncio.run(_round(address, requests))


async def _round(address: str, requests: Sequence[pb.GenerateRequest]) -> Round:
    all_run = asyncio.Event()
    records: dict[int, Completion] = {}

    def note(at: int, record: Completion, text: str) -> None:
        records[at] = record
        if len(records) == len(requests) and min(len(one.arrivals) for one in records.values()) >= MIN_TOKENS_BEFORE:
            all_run.set()

    computed = _computed_tokens(address)
    running = asyncio.create_task(complete_all(address, requests, on_update=note))
    await asyncio.wait_for(all_run.wait(), TIMEOUT_S)
    drained_from = time.monotonic()
    await asyncio.to_thread(scale_decode, address, 1)
    drained_to = time.monotonic()
    finished = tuple(await asyncio.wait_for(running, TIMEOUT_S))
    num_computed = _computed_tokens(address) - computed - sum(len(request.token_ids.ids) for request in requests)
    return _measured(finished, drained_from, drained_to, num_computed)


def _measured(records: tuple[Completion, ...], drained_from: float, drained_to: float, num_computed: int) -> Round:
    before = [gap for one in records for gap in _gaps(one, 0.0, drained_from)]
    step_s = statistics.median(before)
    since = drained_from - (drained_to - drained_from)
    moved = [one for one in records if one.started and one.finished and _has_moved(one)]
    return Round(
        records=records,
        moves=tuple(
            Move(longest_gap_s=max(_gaps(one, drained_from, drained_to), default=0.0), step_s=step_s) for one in moved
        ),
        undisturbed=tuple(max(_gaps(one, since, drained_from), default=0.0) / step_s for one in records),
        drain_s=drained_to - drained_from,
        num_computed_prompts=max(0, num_computed),
    )


def _has_moved(record: Completion) -> bool:
    assert record.started is not None
    assert record.finished is not None
    return record.started.decode_worker != record.finished.decode_worker


def _gaps(record: Completion, begin: float, end: float) -> list[float]:
    """Times between neighbouring tokens of which the later one came in this time."""
    return [later - earlier for earlier, later in pairwise(record.arrivals) if begin < later <= end]


def _decode_states(admin: object) -> list[str]:
    state = admin.ClusterState(pb.ClusterStateRequest(), timeout=15)  # type: ignore[attr-defined]
    return [worker.state for worker in state.workers if worker.role == "decode"]


def _computed_tokens(address: str) -> int:
    """By prefill workers, ever."""
    with admin_stub(address) as admin:
        state = admin.ClusterState(pb.ClusterStateRequest(), timeout=15)
    return sum(worker.computed_tokens for worker in state.workers if worker.role == "prefill")

"""Where a request goes: a pure function of prefix hits and loads.

Owns the weighing of reuse against load, and the order among equals. Does not know sessions, time or tokens' values.
All costs are in tokens of prefill work, the unit that queues are measured in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duopool.core.handoff.request import Member, Route
from duopool.core.messages import WorkerLoad

PULL_COST = 1 / 32
"""Cost of pulling the KV of one token, against computing it. A pull of 960 blocks of 16 tokens takes about 10 ms."""
SEQUENCE_COST = 16.0
"""Cost of joining a batch, per sequence that is in it or waits for it."""
FULL_COST = 1e6
"""Cost of a pool that cannot hold the request now: taken only when every pool is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A ready worker as the policy sees it."""

    member: Member
    num_hit_tokens: int
    """Tokens of this prefix whose KV it holds, or is just computing."""
    load: WorkerLoad
    num_unseen_tokens: int = 0
    """Prefill work routed to it that its load does not show yet."""
    num_unseen_sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The route, with what spoke for it."""

    route: Route
    num_prefill_tokens: int
    """Tokens expected to be computed, on P or, with local prefill, on D."""


def choose(
    prefill: Sequence[Candidate],
    decode: Sequence[Candidate],
    *,
    num_tokens: int,
    block_size: int,
    local_prefill_max_tokens: int,
    rotation: int = 0,
) -> Decision | None:
    """Route a prefix of `num_tokens` tokens: least estimated work on each side; None when a side has nobody.

    A short remainder is prefilled on D when that is less work than P's queue. Equals are taken in turn: in the order of
    worker ids, beginning with place `rotation`.
    """
    if not prefill or not decode:
        return None
    source = _least(prefill, lambda candidate: prefill_cost(candidate, num_tokens), rotation)
    target = _least(decode, lambda candidate: decode_cost(candidate, num_tokens, block_size), rotation)
    remainder = _uncached(target, num_tokens)
    local_cost = remainder + target.load.num_pending_tokens + target.num_unseen_tokens
    if remainder <= local_prefill_max_tokens and local_cost < prefill_cost(source, num_tokens):
        return Decision(route=Route(prefill=None, decode=target.member), num_prefill_tokens=remainder)
    route = Route(prefill=source.member, decode=target.member)
    return Decision(route=route, num_prefill_tokens=_uncached(source, num_tokens))


def choose_decode(decode: Sequence[Candidate], *, num_tokens: int, block_size: int, rotation: int = 0) -> Member | None:
    """Another decode worker for blocks that P has sealed already."""
    if not decode:
        return None
    return _least(decode, lambda candidate: decode_cost(candidate, num_tokens, block_size), rotation).member


def prefill_cost(candidate: Candidate, num_tokens: int) -> float:
    """Tokens that must be computed there until the request's own last one is."""
    return _uncached(candidate, num_tokens) + candidate.load.num_pending_tokens + candidate.num_unseen_tokens


def decode_cost(candidate: Candidate, num_tokens: int, block_size: int) -> float:
    """Work of pulling what is missing, and of sharing the batch."""
    load = candidate.load
    num_missing = max(0, num_tokens - candidate.num_hit_tokens)
    num_sequences = load.num_running + load.num_waiting + candidate.num_unseen_sequences
    cost = num_missing * PULL_COST + num_sequences * SEQUENCE_COST + load.num_pending_tokens
    num_wanted_blocks = -(-num_missing // block_size) + 1
    if load.num_blocks and num_wanted_blocks > load.num_free_blocks + load.num_cached_blocks:
        cost += FULL_COST
    return cost


def _uncached(candidate: Candidate, num_tokens: int) -> int:
    """Tokens to compute there; the last one always is, because its logits are wanted."""
    return max(1, num_tokens - candidate.num_hit_tokens)


def _least(candidates: Sequence[Candidate], cost: Callable[[Candidate], float], rotation: int) -> Candidate:
    in_order = sorted(candidates, key=lambda candidate: candidate.member.worker_id)
    first = rotation % len(in_order)
    return min(in_order[first:] + in_order[:first], key=cost)

"""Decides which prompts a step computes, and how much of each.

By priority, then earliest deadline first (without deadlines: first come, first served), under a token budget: a long
prompt is cut into chunks, and several prompts share a step. A prompt takes all its blocks when it begins, so that
half-filled prompts never wait for each other. A prompt whose next block is being computed by another one is passed over
until that block is cached: equal prefixes in flight are computed once.

Owns the queues and the table of keys in flight; blocks belong to the manager, leases and messages to the worker.
"""

from __future__ import annotations

from bisect import insort

from duopool.core.config import SchedulerConfig
from duopool.core.errors import OutOfBlocks
from duopool.core.kv_manager import KVCacheManager
from duopool.core.step import Chunk, StepPlan
from duopool.core.types import BlockKey, RequestId
from duopool.prefill_worker.prefill_request import PrefillPhase, PrefillRequest


def _turn(request: PrefillRequest) -> tuple[int, float]:
    return request.turn


class PrefillScheduler:
    """Two queues in the order of turns: prompts that wait, and prompts that are being filled."""

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig, *, eos_token_ids: frozenset[int]) -> None:
        self.waiting: list[PrefillRequest] = []
        self.filling: list[PrefillRequest] = []
        self._manager = manager
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._in_flight: dict[BlockKey, RequestId] = {}
        """Keys of blocks that a filling prompt will cache, with its table."""

    @property
    def num_pending_tokens(self) -> int:
        return sum(one.num_missing_tokens for one in self.waiting) + sum(one.num_missing_tokens for one in self.filling)

    def add(self, request: PrefillRequest) -> None:
        insort(self.waiting, request, key=_turn)

    def remove(self, request: PrefillRequest) -> None:
        """Take a request out of its queue. Its table is the caller's to free."""
        if request.phase is PrefillPhase.WAITING:
            self.waiting.remove(request)
        elif request.phase is PrefillPhase.FILLING:
            self.filling.remove(request)
            self._let_go(request, 0)

    def schedule(self, *, now: float) -> tuple[StepPlan, list[PrefillRequest]]:
        """The next step, and the prompts that begin with it."""
        budget = self._config.max_num_batched_tokens
        chunks: list[Chunk] = []
        for request in self.filling:
            if budget == 0:
                break
            budget -= self._take(request, budget, chunks)
        begun: list[PrefillRequest] = []
        for request in list(self.waiting):
            if budget == 0 or len(self.filling) >= self._config.max_num_seqs:
                break
            if self._is_computed_elsewhere(request):
                continue
            if not self._begin(request, now=now):
                break
            begun.append(request)
            budget -= self._take(request, budget, chunks)
        return StepPlan(chunks=tuple(chunks)), begun

    def computed(self, request: PrefillRequest, num_tokens: int) -> None:
        """A step wrote `num_tokens` more tokens: their full blocks are cached for everyone."""
        request.num_computed_tokens += num_tokens
        self._manager.publish(request.table, request.num_computed_tokens)
        if request.phase is PrefillPhase.FILLING:
            self._let_go(request, 0, request.num_computed_tokens // self._manager.block_size)

    def check(self) -> None:
        """Raise AssertionError unless queues, phases, tables and keys in flight agree."""
        assert all(one.phase is PrefillPhase.WAITING and not self._manager.has(one.table) for one in self.waiting)
        assert all(one.phase is PrefillPhase.FILLING and self._manager.has(one.table) for one in self.filling)
        assert set(self._in_flight.values()) <= {one.table for one in self.filling}

    def _take(self, request: PrefillRequest, budget: int, chunks: list[Chunk]) -> int:
        num_tokens = min(budget, request.num_missing_tokens)
        block_ids = tuple(self._manager.block_ids(request.table))
        chunks.append(request.chunk(num_tokens, block_ids, self._eos_token_ids))
        return num_tokens

    def _num_hits(self, request: PrefillRequest) -> int:
        """Leading blocks that the request could take from the cache now."""
        return self._manager.lookup(request.keys[: request.max_cached_tokens // self._manager.block_size])

    def _is_computed_elsewhere(self, request: PrefillRequest) -> bool:
        num_wanted = request.max_cached_tokens // self._manager.block_size
        num_hits = self._num_hits(request)
        return num_hits < num_wanted and request.keys[num_hits] in self._in_flight

    def _begin(self, request: PrefillRequest, *, now: float) -> bool:
        """Pin the cached prefix and take the other blocks, or change nothing and return False."""
        manager = self._manager
        if manager.blocks_for(request.num_tokens) - self._num_hits(request) > manager.num_available:
            return False
        limit = request.max_cached_tokens
        num_cached = manager.admit(
            request.table, request.token_ids, salt=request.request.cache_salt, max_cached_tokens=limit
        )
        try:
            manager.reserve(request.table, request.num_tokens)
        except OutOfBlocks:
            manager.free(request.table)
            return False
        request.num_cached_tokens = request.num_computed_tokens = num_cached
        # It may have come while the step, which began before it, waited for the worker's lock.
        request.started_at = max(now, request.arrived_at)
        request.phase = PrefillPhase.FILLING
        self.waiting.remove(request)
        insort(self.filling, request, key=_turn)
        for key in request.keys[num_cached // manager.block_size :]:
            self._in_flight.setdefault(key, request.table)
        return True

    def _let_go(self, request: PrefillRequest, start: int, end: int | None = None) -> None:
        for key in request.keys[start:end]:
            if self._in_flight.get(key) == request.table:
                del self._in_flight[key]

"""Decides who gets blocks and what a step computes on a decode worker.

Continuous batching: every running request gets one token per step; what is left of the token budget goes to prefixes
that are computed here (short prompts, and recompute after preemption). Nobody in the batch ever waits for a handoff.

Admission is by priority, then earliest deadline first, and leaves head-room so that running requests can grow. A
handoff is admitted once its source has listed something: blocks are taken there first and here second, so that two
requests never wait for each other's. When one cannot grow, the request of the least priority that arrived last gives
up its blocks, keeps its tokens, and waits again before its equals that have not begun: what it had computed is still
cached unless others needed the room.

A carrier takes seats and head-room for all its choices. When its prompt is here they take its place, over the same
blocks; the one that is partly filled is copied for each as it begins to write. Owns the queues; blocks belong to the
manager, messages to the worker.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from duopool.core.config import SchedulerConfig
from duopool.core.errors import OutOfBlocks
from duopool.core.kv_manager import KVCacheManager
from duopool.core.step import Chunk, StepPlan
from duopool.core.types import BlockCopy
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest


def _seat(request: DecodeRequest) -> tuple[int, int]:
    return request.seat


def _urgency(request: DecodeRequest) -> tuple[int, bool, float, int]:
    return request.urgency


class DecodeScheduler:
    """Requests that wait, by their urgency; that pull their blocks; and that run, by their seats."""

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig, *, eos_token_ids: frozenset[int]) -> None:
        self.waiting: list[DecodeRequest] = []
        self.pulling: list[DecodeRequest] = []
        """They hold blocks that a read may write to; ended ones stay until their reads have ended."""
        self.running: list[DecodeRequest] = []
        self.parked: list[DecodeRequest] = []
        self.num_preemptions = 0
        self._copies: list[BlockCopy] = []
        """Of the step that is being planned; sources are pinned until it has run."""
        self._manager = manager
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._num_kept_free = int(config.watermark * manager.num_blocks)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room here.

        Handoffs of which nothing is listed are bounded by their sources' queues; were they counted, one that waits for
        blocks there could keep out the one that holds them.
        """
        return sum(one.wants_blocks for one in self.waiting)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to be computed here before the requests that are known can decode."""
        waiting = sum(one.num_missing_tokens for one in self.waiting if one.slot is None)
        return waiting + sum(one.num_missing_tokens for one in self.running if not one.is_decoding)

    @property
    def num_coming(self) -> int:
        """Requests that will join the batch as soon as others have prefilled them; those that move are prefilled."""
        num_pulling = sum(one.slot is not None and not one.slot.is_moving for one in self.pulling)
        num_announced = sum(
            one.slot is not None and not one.slot.is_moving and not one.wants_blocks for one in self.waiting
        )
        return num_pulling + min(num_announced, self._config.max_num_seqs - self._num_seqs)

    def add(self, request: DecodeRequest) -> None:
        """Let a request wait in its place."""
        insort(self.waiting, request, key=_urgency)

    def join(self, request: DecodeRequest) -> None:
        """All blocks of a handoff are here: the request decodes from the next step on."""
        self.pulling.remove(request)
        request.phase = DecodePhase.RUNNING
        insort(self.running, request, key=_seat)

    def part(self, carrier: DecodeRequest, forks: Sequence[DecodeRequest]) -> None:
        """Forks take the carrier's place in the batch; those that find no seat wait, and take what is cached then.

        The carrier's table is the caller's to free.
        """
        self.remove(carrier)
        for fork in forks:
            if self._num_seqs < self._config.max_num_seqs:
                self._manager.fork(carrier.table, fork.table)
                self._manager.append(fork.table, fork.output)
                fork.phase = DecodePhase.RUNNING
                insort(self.running, fork, key=_seat)
            else:
                fork.num_computed_tokens = 0
                self.add(fork)

    def park(self, request: DecodeRequest) -> None:
        """The request keeps its blocks and gets no more steps."""
        self.running.remove(request)
        request.phase = DecodePhase.PARKED
        self.parked.append(request)

    def unpark(self, request: DecodeRequest) -> None:
        """The request decodes on."""
        self.parked.remove(request)
        request.phase = DecodePhase.RUNNING
        insort(self.running, request, key=_seat)

    def remove(self, request: DecodeRequest) -> None:
        """Take a request out of its queue. Its table is the caller's to free."""
        for queue in (self.waiting, self.pulling, self.running, self.parked):
            if request in queue:
                queue.remove(request)

    def admit(self) -> list[DecodeRequest]:
        """Give blocks to those that want them, in order, as long as there is head-room; return those that got them."""
        admitted = []
        for request in [one for one in self.waiting if one.wants_blocks]:
            if self._num_seqs + self._seats(request) > self._config.max_num_seqs or not self._open_table(request):
                break
            self.waiting.remove(request)
            if request.slot is None:
                request.phase = DecodePhase.RUNNING
                insort(self.running, request, key=_seat)
            else:
                request.phase = DecodePhase.PULLING
                self.pulling.append(request)
            admitted.append(request)
        return admitted

    def schedule(self) -> StepPlan:
        """The next step. Decodes first; every one of them gets its token whatever the budget is."""
        chunks: list[Chunk] = []
        self._copies.clear()
        for request in list(self.running):
            if request.phase is DecodePhase.RUNNING and request.is_decoding and self._grow(request):
                chunks.append(self._chunk(request, 1))
        budget = max(1, self._config.max_num_batched_tokens - len(chunks))
        for request in self.running:
            if budget and not request.is_decoding:
                chunks.append(self._chunk(request, min(budget, request.num_missing_tokens)))
                budget -= len(chunks[-1].token_ids)
        return StepPlan(chunks=tuple(chunks), copies=tuple(self._copies))

    def check(self) -> None:
        """Raise AssertionError unless queues, order, phases and tables agree."""
        assert [one.urgency for one in self.waiting] == sorted({one.urgency for one in self.waiting})
        assert [one.seat for one in self.running] == sorted({one.seat for one in self.running})
        assert all(one.phase is DecodePhase.WAITING and not self._manager.has(one.table) for one in self.waiting)
        assert not any(one.num_computed_tokens for one in self.waiting)
        assert all(one.phase is DecodePhase.RUNNING and self._manager.has(one.table) for one in self.running)
        assert all(self._manager.has(one.table) for one in (*self.pulling, *self.parked))
        assert all(one.phase is DecodePhase.PARKED for one in self.parked)
        assert self._num_seqs <= self._config.max_num_seqs

    @property
    def _num_seqs(self) -> int:
        """Sequences that hold blocks."""
        return sum(self._seats(one) for queue in (self.pulling, self.running, self.parked) for one in queue)

    def _seats(self, request: DecodeRequest) -> int:
        """Sequences that a request takes of the batch at once."""
        return min(request.num_sequences, self._config.max_num_seqs)

    def _chunk(self, request: DecodeRequest, num_tokens: int) -> Chunk:
        return request.chunk(num_tokens, self._manager.block_ids(request.table), self._eos_token_ids)

    def _open_table(self, request: DecodeRequest) -> bool:
        """Blocks for the prefix and the next token of each sequence, with head-room left; or nothing, and False."""
        manager = self._manager
        is_alone = not self.pulling and not self.running
        num_kept_free = 0 if is_alone else self._num_kept_free
        num_hits = manager.lookup(request.keys[: request.max_cached_tokens // manager.block_size])
        # Every choice behind the first takes one block more. A sequence that fills the whole pool samples its last
        # token without another slot.
        num_slots = request.num_tokens + 1 + (self._seats(request) - 1) * manager.block_size
        num_slots = min(num_slots, manager.num_blocks * manager.block_size)
        num_missing = manager.blocks_for(num_slots) - num_hits
        # Blocks of the output may be cached too, so a preempted request can only need fewer than this.
        if request.num_tokens == len(request.request.token_ids) and num_missing + num_kept_free > manager.num_available:
            return False
        limit = request.max_cached_tokens
        token_ids = request.tokens(0, request.num_tokens)
        num_cached = manager.admit(request.table, token_ids, salt=request.request.cache_salt, max_cached_tokens=limit)
        try:
            manager.reserve(request.table, num_slots)
        except OutOfBlocks:
            manager.free(request.table)
            return False
        if manager.num_available < num_kept_free:
            manager.free(request.table)
            return False
        request.num_cached_tokens = request.num_computed_tokens = num_cached
        return True

    def _grow(self, request: DecodeRequest) -> bool:
        """Make room for the newest token's KV, preempting from the back; False if the request itself had to go."""
        while True:
            try:
                self._manager.reserve(request.table, request.num_tokens)
                if request.is_fork:
                    self._own_newest_block(request)
                return True
            except OutOfBlocks:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False

    def _own_newest_block(self, fork: DecodeRequest) -> None:
        """Copy on write. The pin keeps the source as it is until the copy is made, whoever gives it up meanwhile."""
        copies = self._manager.prepare_write(fork.table, fork.num_computed_tokens, fork.num_tokens)
        self._manager.pin([copy.source for copy in copies])
        self._copies += copies
        fork.is_fork = False

    def _preempt(self, request: DecodeRequest) -> None:
        self.running.remove(request)
        self._manager.free(request.table)
        request.phase = DecodePhase.WAITING
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        request.slot = None
        request.is_fork = False
        self.num_preemptions += 1
        self.add(request)

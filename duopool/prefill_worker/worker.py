"""A prefill worker: computes prompts chunk by chunk, and keeps their blocks under a lease until they are read.

1. `Prefill` puts a request into the queue. 2. `step` computes chunks; after each one the finished blocks are sealed and
listed in a `BlocksReady`, the last of which carries the first token. 3. The lease, made with the first `BlocksReady`,
holds until a decode worker has validated its read, or until it is cancelled or its time is over; then the blocks are
cache.

Commands and the KV source's questions are answered while a step runs: the lock covers bookkeeping only. A request that
ends while a step writes to its blocks keeps them until the step has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from duopool.core.config import WorkerConfig
from duopool.core.kv_manager import KVCacheManager
from duopool.core.ledger import WorkerLedger
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    LedgerReport,
    LedgerWanted,
    NackReason,
    Prefill,
    ReadBlocks,
    Rebind,
    Reserve,
    SealedBlock,
    SnapshotWanted,
    Tokens,
    Validate,
    Verdict,
    WorkerLoad,
)
from duopool.core.step import NO_TOKEN, NOT_NUMBERS, Runner, StepPlan, StepResult
from duopool.core.types import LeaseId, RequestId
from duopool.core.worker import Addressed, SessionId
from duopool.engine.arrivals import NOT_HERE, Arrivals, Standing, due_at
from duopool.engine.failpoints import Failpoint, reach
from duopool.engine.leases import LeaseBook, SourceIdentity
from duopool.engine.ledger import make_ledger, unique
from duopool.engine.next_token import next_tokens
from duopool.engine.outbox import Outbox
from duopool.engine.sealer import Sealer
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings
from duopool.prefill_worker.holder import holder
from duopool.prefill_worker.prefill_request import PrefillPhase, PrefillRequest, table_name
from duopool.prefill_worker.scheduler import PrefillScheduler
from duopool.prefill_worker.stretch import Stretch, stretch_of

log = logging.getLogger(__name__)


class PrefillWorker:
    """Implements `core.worker.Worker` and `engine.transfer.transport.LeaseKeeper`."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        identity: SourceIdentity,
        model: ServedModel,
        manager: KVCacheManager,
        runner: Runner,
        surroundings: Surroundings,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called without the lock when blocks were freed or events came up outside of handle, step and tick."""
        self._model = model
        self._manager = manager
        self._runner = runner
        self._seal = surroundings.seal
        self._sealer = Sealer(surroundings.seal)
        self._clock = surroundings.clock
        self._timers = config.handoff
        self._scheduler = PrefillScheduler(manager, config.scheduler, eos_token_ids=model.eos_token_ids)
        self._outbox = Outbox()
        self._requests: dict[RequestId, PrefillRequest] = {}
        self._leases: LeaseBook[PrefillRequest] = LeaseBook(
            identity, manager=manager, new_lease_id=surroundings.new_lease_id, ttl_s=config.handoff.lease_ttl_s
        )
        self._arrivals = Arrivals(model, config.handoff, config.scheduler)
        self._in_step: list[Stretch] = []
        """What the step that runs now does."""
        self._num_steps = 0
        self._num_ticks = 0
        self._num_computed_tokens = 0
        self._step_s = 0.0
        self._lock = threading.Lock()

    # ---- Worker --------------------------------------------------------------------------------------------------

    def open_session(self, session: SessionId, *, now: float) -> None:
        with self._lock:
            self._outbox.open(session, now=now)
            self._outbox.say_kv_snapshot(session, self._manager)
            self._outbox.say(session, self._load())

    def close_session(self, session: SessionId, *, now: float) -> None:
        with self._lock:
            self._outbox.close(session, now=now)

    def handle(self, command: Command, session: SessionId, *, now: float) -> None:
        with self._lock:
            self._outbox.heard(session, now=now)
            match command:
                case Prefill():
                    self._prefill(command, session, now=now)
                case Cancel():
                    self._cancel(command, now=now)
                case Rebind():
                    self._rebind(command, session)
                case Heartbeat():
                    for lease_id in command.lease_ids:
                        if (holder := self._leases.holder(lease_id)) is not None:
                            self._leases.extend(holder, now=now)
                    for one in self._arrivals.missing(command.attempts, self._requests, now=now):
                        self._outbox.refuse(session, one.request_id, one.attempt, NackReason.UNKNOWN, NOT_HERE)
                case SnapshotWanted():
                    self._outbox.say_kv_snapshot(session, self._manager)
                case LedgerWanted(audit_id=audit_id):
                    self._outbox.say(session, LedgerReport(audit_id=audit_id, ledger=self._ledger(session, now=now)))
                case Reserve(request=request, attempt=attempt):
                    self._outbox.refuse(
                        session, request.request_id, attempt, NackReason.INTERNAL, "this worker prefills"
                    )
                case BlocksReady():
                    pass  # meant for a decode worker
            self._outbox.say_kv_changes(self._manager)

    def step(self, *, now: float) -> bool:
        with self._lock:
            if self._leases:
                reach(Failpoint.LEASED)
            plan, stretches = self._schedule(now=now)
        if plan.is_empty:
            return False
        try:
            result = self._runner.execute(plan)
            sealed = [self._sealer.seal(stretch.finished, stretch.generations) for stretch in stretches]
            reach(Failpoint.FILLING)
        except Exception as error:
            with self._lock:
                self._blame(stretches, error)
            raise
        with self._lock:
            self._commit(stretches, result, sealed, started_at=now)
        return True

    @property
    def rest_s(self) -> float:
        return 0.0

    def tick(self, *, now: float) -> None:
        with self._lock:
            self._num_ticks += 1
            self._end_late(now=now)
            for request in list(self._requests.values()):
                self._sweep(request, now=now)
            self._arrivals.sweep(now=now)
            self._outbox.sweep(now=now, limit_s=self._timers.orphan_ttl_s)
            self._report()

    def take_events(self) -> tuple[Addressed, ...]:
        with self._lock:
            return self._outbox.take()

    def load(self) -> WorkerLoad:
        with self._lock:
            return self._load()

    @property
    def is_idle(self) -> bool:
        with self._lock:
            return not self._requests and not self._leases and not self._in_step

    def drain(self) -> None:
        """Refuse new requests from now on; those that are here go on."""
        with self._lock:
            self._arrivals.drain()

    def check(self) -> None:
        with self._lock:
            self._check()

    # ---- LeaseKeeper ---------------------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks) -> str:
        """Count a read that this process serves itself; the answer is a refusal or empty."""
        reach(Failpoint.LEASED)
        with self._lock:
            refusal = self._leases.begin_read(read, now=self._clock())
        reach(Failpoint.BEING_READ)
        return refusal

    def end_read(self, lease_id: LeaseId) -> None:
        """The counted read has ended."""
        with self._lock:
            request = self._leases.end_read(lease_id)
            if request is None:
                return
            self._free_if_possible(request)
        self.on_change()

    def validate(self, validate: Validate) -> Verdict:
        """Whether the lease still holds for this attempt and every generation is unchanged; may also end it."""
        reach(Failpoint.BEING_READ)
        with self._lock:
            verdict = self._leases.validate(validate, now=self._clock())
            request = self._leases.holder(validate.lease_id)
            if not verdict.ok or request is None:
                return verdict
            if validate.release and request.phase is PrefillPhase.LEASED:
                self._end(request, now=self._clock())
                self._outbox.say_kv_changes(self._manager)
        self.on_change()
        return verdict

    # ---- commands ------------------------------------------------------------------------------------------------

    def _prefill(self, command: Prefill, session: SessionId, *, now: float) -> None:
        request, attempt = command.request, command.attempt
        known = self._requests.get(request.request_id)
        present = None if known is None else known.attempt
        standing = self._arrivals.standing(request.request_id, attempt, present=present)
        if known is not None and standing is Standing.AGAIN:
            self._answer_again(known, session)
        elif standing is Standing.STALE:
            self._outbox.refuse(session, request.request_id, attempt, NackReason.STALE, "a newer attempt was seen")
        elif standing is Standing.NEW:
            if known is not None:
                self._end(known, now=now)
            refusal = self._arrivals.refusal(
                request,
                num_tokens_in_pool=self._manager.num_blocks * self._manager.block_size,
                num_tokens_ahead=0,
                num_waiting=len(self._scheduler.waiting),
                num_pending_tokens=self._scheduler.num_pending_tokens,
            )
            if refusal is not None:
                self._outbox.refuse(session, request.request_id, attempt, refusal.reason, refusal.detail)
            else:
                self._accept(command, session, now=now)

    def _accept(self, command: Prefill, session: SessionId, *, now: float) -> None:
        token_ids = command.request.token_ids
        request = PrefillRequest(
            table=table_name(command.request.request_id, command.attempt),
            request=command.request,
            attempt=command.attempt,
            session=session,
            arrived_at=now,
            deadline_at=None if command.deadline_s is None else now + command.deadline_s,
            due_at=due_at(command.deadline_s, now=now),
            token_ids=token_ids,
            keys=self._manager.keys(token_ids, command.request.cache_salt),
        )
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def _answer_again(self, request: PrefillRequest, session: SessionId) -> None:
        """The same command once more, maybe over a new session: say again what was said."""
        request.session = session
        if request.phase is not PrefillPhase.WAITING:
            self._outbox.say(session, request.accepted())
            for message in request.ready:
                self._outbox.say(session, message)

    def _cancel(self, command: Cancel, *, now: float) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.attempt <= command.attempt:
            if command.check_pages:
                self._check_pages(request, now=now)
            self._end(request, now=now)
        self._arrivals.bury(command.request_id, command.attempt, now=now)

    def _check_pages(self, suspect: PrefillRequest, *, now: float) -> None:
        """Take listed pages that are not what was sealed out of the cache, and give up all who compute behind them."""
        sealed = () if suspect.lease is None else suspect.lease.blocks
        present = self._seal([block.block_id for block in sealed], [block.generation for block in sealed])
        damaged = {block.block_id for block, now_there in zip(sealed, present, strict=True) if block != now_there}
        if not damaged:
            return
        log.error("%d pages are not what they were when they were sealed", len(damaged))
        for request in list(self._requests.values()):
            has_table = request is not suspect and self._manager.has(request.table)
            if has_table and not damaged.isdisjoint(self._manager.block_ids(request.table)):
                self._nack(request, NackReason.LEASE_LOST, "its prefix was damaged in memory", now=now)
        self._manager.discard(damaged)

    def _rebind(self, command: Rebind, session: SessionId) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and self._leases.rebind(request, command.lease_id, command.attempt):
            request.session = session
        elif not self._arrivals.is_over(command.request_id, command.attempt):
            self._outbox.refuse(session, command.request_id, command.attempt, NackReason.LEASE_LOST, "unknown lease")

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _schedule(self, *, now: float) -> tuple[StepPlan, list[Stretch]]:
        self._end_late(now=now)
        plan, begun = self._scheduler.schedule(now=now)
        for request in begun:
            self._outbox.say(request.session, request.accepted())
        by_table = {request.table: request for request in self._scheduler.filling}
        self._in_step = [stretch_of(by_table[chunk.request_id], chunk, self._manager) for chunk in plan.chunks]
        for stretch in self._in_step:
            stretch.request.is_in_step = True
        self._outbox.say_kv_changes(self._manager)
        return plan, self._in_step

    def _commit(
        self,
        stretches: list[Stretch],
        result: StepResult,
        sealed: list[tuple[SealedBlock, ...]],
        *,
        started_at: float,
    ) -> None:
        now = self._clock()
        self._in_step = []
        self._num_steps += 1
        self._step_s = now - started_at
        for stretch, blocks in zip(stretches, sealed, strict=True):
            request, num_tokens = stretch.request, stretch.num_tokens
            request.is_in_step = False
            self._num_computed_tokens += num_tokens
            self._scheduler.computed(request, num_tokens)
            if request.phase is PrefillPhase.ENDED:
                self._free_if_possible(request)
                continue
            request.prompt_logprobs += result.prompt_logprobs.get(request.table, ())
            if request.num_missing_tokens == 0:
                self._finish(request, blocks, result, now=now)
            elif blocks:
                self._list(request, blocks, (), now=now)
        self._report()

    def _finish(
        self, request: PrefillRequest, blocks: tuple[SealedBlock, ...], result: StepResult, *, now: float
    ) -> None:
        """The whole prefix is computed: hand first tokens out, and the blocks if more tokens are to follow."""
        sampled = result.tokens[request.table]
        if any(each.token_id == NO_TOKEN for each in sampled):
            self._nack(request, NackReason.INTERNAL, NOT_NUMBERS, now=now)
            return
        first_tokens = next_tokens(
            self._model,
            request.request,
            sampled,
            attempt=request.attempt,
            index=len(request.request.output_token_ids),
            max_tokens=self._model.max_model_len,
            prompt_logprobs=request.prompt_logprobs,
        )
        if any(tokens.finish_reason is None for tokens in first_tokens):
            self._scheduler.remove(request)
            self._list(request, blocks, first_tokens, now=now)
            request.phase = PrefillPhase.LEASED
        else:
            self._list(request, (), first_tokens, now=now)
            self._end(request, now=now)

    def _list(
        self, request: PrefillRequest, blocks: tuple[SealedBlock, ...], first_tokens: tuple[Tokens, ...], *, now: float
    ) -> None:
        """Put blocks under the request's lease and tell the router of them."""
        lease = self._leases.seal(request, blocks, now=now)
        self._outbox.say(request.session, request.list_blocks(blocks, lease, first_tokens, now=now))

    def _blame(self, stretches: list[Stretch], error: Exception) -> None:
        """The engine failed. A request that was alone in the step is told that it was the cause."""
        if len(stretches) == 1:
            request = stretches[0].request
            self._outbox.refuse(request.session, request.request_id, request.attempt, NackReason.INTERNAL, str(error))

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end_late(self, *, now: float) -> None:
        for request in [*self._scheduler.waiting, *self._scheduler.filling]:
            if request.is_late(now=now):
                self._nack(request, NackReason.DEADLINE, "the deadline passed before the prompt was computed", now=now)

    def _sweep(self, request: PrefillRequest, *, now: float) -> None:
        """Let time act on one request: a lease runs out, a silent router's prompt is given up."""
        if request.phase is PrefillPhase.LEASED:
            if self._leases.has_expired(request, now=now):
                self._end(request, now=now)
        elif self._outbox.is_silent(request.session, now=now, limit_s=self._timers.orphan_ttl_s):
            self._nack(request, NackReason.STALE, "the router was silent for too long", now=now)
        else:
            self._leases.extend(request, now=now)

    def _nack(self, request: PrefillRequest, reason: NackReason, detail: str, *, now: float) -> None:
        self._outbox.refuse(request.session, request.request_id, request.attempt, reason, detail)
        self._end(request, now=now)

    def _end(self, request: PrefillRequest, *, now: float) -> None:
        """Forget the request and remember that this attempt is over; its full blocks stay as cache."""
        self._scheduler.remove(request)
        request.phase = PrefillPhase.ENDED
        del self._requests[request.request_id]
        self._arrivals.bury(request.request_id, request.attempt, now=now)
        self._leases.revoke(request)
        self._free_if_possible(request)

    def _free_if_possible(self, request: PrefillRequest) -> None:
        """Close the table of an ended request once neither a step nor a counted read needs it."""
        is_needed = request.phase is not PrefillPhase.ENDED or request.is_in_step
        if not is_needed and self._leases.close(request) and self._manager.has(request.table):
            self._manager.free(request.table)

    # ---- invariants ----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self._manager.check()
        self._scheduler.check()
        self._leases.check()
        for held in self._leases.holders:
            assert self._manager.has(held.table)
            is_read = held.lease is not None and held.lease.num_readers > 0
            assert held.phase is not PrefillPhase.ENDED or held.is_in_step or is_read
        for request in self._requests.values():
            assert request.phase is not PrefillPhase.ENDED
            assert (request.phase is PrefillPhase.WAITING) != self._manager.has(request.table)
            assert request.phase is not PrefillPhase.LEASED or request.lease is not None

    def _ledger(self, asker: SessionId, *, now: float) -> WorkerLedger:
        stepping = (stretch.request for stretch in self._in_step)
        holders = unique((*self._requests.values(), *self._leases.holders, *stepping))
        entries = tuple(holder(request, self._outbox, asker=asker, now=now) for request in holders)
        return make_ledger(self._manager, entries, check=self._check)

    # ---- reports -------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        self._outbox.say_kv_changes(self._manager)
        self._outbox.say_load(self._load())

    def _load(self) -> WorkerLoad:
        return WorkerLoad(
            num_waiting=len(self._scheduler.waiting),
            num_running=len(self._scheduler.filling),
            num_pending_tokens=self._scheduler.num_pending_tokens,
            num_blocks=self._manager.num_blocks,
            num_free_blocks=self._manager.num_free,
            num_cached_blocks=self._manager.num_cached,
            num_steps=self._num_steps,
            num_ticks=self._num_ticks,
            num_computed_tokens=self._num_computed_tokens,
            num_leases=len(self._leases),
            step_s=self._step_s,
        )

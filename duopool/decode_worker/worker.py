"""A decode worker: takes head-room for requests, pulls their blocks from prefill workers, and decodes them together.

1. `Reserve` announces a request. With its first `BlocksReady` it waits for head-room; `Reserved` tells the router when
it has it. 2. Every `BlocksReady` starts a read of the blocks that are not cached here, while the prefill worker still
computes. 3. When all is read and the prefill worker has confirmed its lease, the request joins the batch behind its
first token. 4. Every step gives each running request one token. A `Reserve` with `local_prefill` skips 2 and 3: the
prefix is computed here. 5. After `Migrate` a running request goes over to another decode worker, which reads its blocks
from here. A carrier never joins: when its prompt is here its choices do, as requests of their own.

Handoffs are driven by `handoff.py`, migrations by `departures.py`; here is what they mean for queues, blocks and the
router. Commands and the reader's answers are taken while a step runs: the lock covers bookkeeping only, and the reader
is called without it. A request that ends while a step or a read may write to its blocks keeps them until that has
ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duopool.core.config import WorkerConfig
from duopool.core.errors import OutOfBlocks
from duopool.core.handoff import slot as slots
from duopool.core.handoff.slot import Slot
from duopool.core.kv_manager import KVCacheManager
from duopool.core.ledger import WorkerLedger
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Copied,
    Heartbeat,
    LedgerReport,
    LedgerWanted,
    Migrate,
    NackReason,
    Prefill,
    ReadBlocks,
    Rebind,
    Reserve,
    SnapshotWanted,
    Stay,
    Tokens,
    Validate,
    Verdict,
    WorkerLoad,
)
from duopool.core.step import Runner, StepPlan, StepResult
from duopool.core.types import BlockId, LeaseId, RequestId
from duopool.core.worker import Addressed, SessionId
from duopool.decode_worker import listing
from duopool.decode_worker.batch import Batch
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest, table_name
from duopool.decode_worker.departures import Departures
from duopool.decode_worker.handoff import Answer, Handoffs, Outcome
from duopool.decode_worker.holder import holder
from duopool.decode_worker.pace import rest_s
from duopool.decode_worker.scheduler import DecodeScheduler
from duopool.engine.arrivals import NOT_HERE, Arrivals, Standing, due_at
from duopool.engine.failpoints import Failpoint, reach
from duopool.engine.leases import SourceIdentity
from duopool.engine.ledger import make_ledger, unique
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.transport import BlockReader


class DecodeWorker:
    """Implements `core.worker.Worker` and `engine.transfer.transport.LeaseKeeper`."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        model: ServedModel,
        manager: KVCacheManager,
        runner: Runner,
        reader: BlockReader,
        identity: SourceIdentity,
        surroundings: Surroundings,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called without the lock when something happened outside of handle, step and tick."""
        self._model = model
        self._manager = manager
        self._runner = runner
        self._clock = surroundings.clock
        self._timers = config.handoff
        self._shares_cores = config.shares_cores
        self._max_tokens = manager.num_blocks * manager.block_size + 1
        """Longest sequence the pool can bring forth: the last token needs no KV."""
        self._scheduler = DecodeScheduler(manager, config.scheduler, eos_token_ids=model.eos_token_ids)
        self._outbox = Outbox()
        self._requests: dict[RequestId, DecodeRequest] = {}
        self._arrivals = Arrivals(model, config.handoff, config.scheduler)
        self._handoffs = Handoffs(reader, on_answer=self._take_answer, clock=surroundings.clock)
        self._departures = Departures(
            identity,
            manager=manager,
            outbox=self._outbox,
            surroundings=surroundings,
            ttl_s=config.handoff.lease_ttl_s,
        )
        self._batch = Batch(
            self._scheduler, model=model, manager=manager, outbox=self._outbox, max_tokens=self._max_tokens
        )
        self._num_arrived = 0
        self._num_ticks = 0
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
        with self._changing():
            self._outbox.heard(session, now=now)
            match command:
                case Reserve():
                    self._reserve(command, session, now=now)
                case BlocksReady():
                    self._blocks_ready(command, session, now=now)
                case Cancel():
                    self._cancel(command, now=now)
                case Migrate():
                    self._migrate(command, session, now=now)
                case Copied():
                    self._departures.copied(command)
                case Stay():
                    self._departures.stay(command)
                case SnapshotWanted():
                    self._outbox.say_kv_snapshot(session, self._manager)
                case LedgerWanted(audit_id=audit_id):
                    self._outbox.say(session, LedgerReport(audit_id=audit_id, ledger=self._ledger(session, now=now)))
                case Prefill(request=request, attempt=attempt):
                    self._outbox.refuse(
                        session, request.request_id, attempt, NackReason.INTERNAL, "this worker decodes"
                    )
                case Heartbeat(attempts=attempts):
                    for one in self._arrivals.missing(attempts, self._requests, now=now):
                        self._outbox.refuse(session, one.request_id, one.attempt, NackReason.UNKNOWN, NOT_HERE)
                case Rebind():
                    pass  # leases are a prefill worker's

    def step(self, *, now: float) -> bool:
        with self._changing():
            self._admit()
            plan = self._batch.plan()
            listings = self._departures.plan(self._batch.requests)
        if plan.is_empty:
            return False
        try:
            result = self._runner.execute(plan)
            sealed = self._departures.seal(listings)
            reach(Failpoint.DECODING)
        except Exception as error:
            with self._lock:
                self._blame(error)
            raise
        with self._changing():
            self._commit(plan, result, started_at=now)
            for request in self._departures.commit(listings, sealed, now=self._clock()):
                self._scheduler.park(request)
        return True

    @property
    def rest_s(self) -> float:
        with self._lock:
            if not self._shares_cores or self._scheduler.num_pending_tokens:
                return 0.0
            num_running, num_coming = len(self._scheduler.running), self._scheduler.num_coming
            return rest_s(step_s=self._batch.step_s, num_running=num_running, num_coming=num_coming)

    def tick(self, *, now: float) -> None:
        with self._changing():
            self._num_ticks += 1
            for request in list(self._requests.values()):
                if self._outbox.is_silent(request.session, now=now, limit_s=self._timers.orphan_ttl_s):
                    self._nack(request, NackReason.STALE, "the router was silent for too long")
                elif request.is_handed_over and now - request.told_at >= self._timers.lease_ttl_s:
                    # Nothing else would be said while no block comes: a router whose Cancel was lost cancels again.
                    self._say_reserved(request)
            self._departures.tick(now=now)
            self._arrivals.sweep(now=now)
            self._outbox.sweep(now=now, limit_s=self._timers.orphan_ttl_s)
            self._outbox.say_load(self._load())

    def take_events(self) -> tuple[Addressed, ...]:
        with self._lock:
            return self._outbox.take()

    def load(self) -> WorkerLoad:
        with self._lock:
            return self._load()

    @property
    def is_idle(self) -> bool:
        with self._lock:
            is_busy = self._requests or self._scheduler.pulling or self._batch.requests or self._departures
            return not is_busy

    def drain(self) -> None:
        """Refuse new requests from now on; those that are here go on."""
        with self._lock:
            self._arrivals.drain()

    def check(self) -> None:
        with self._lock:
            self._check()

    # ---- LeaseKeeper ---------------------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks) -> str:
        with self._lock:
            return self._departures.begin_read(read, now=self._clock())

    def end_read(self, lease_id: LeaseId) -> None:
        with self._changing():
            self._departures.end_read(lease_id)
        self.on_change()

    def validate(self, validate: Validate) -> Verdict:
        with self._lock:
            return self._departures.validate(validate, now=self._clock())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; let what was freed be taken and what happened be told; then make the reader's calls."""
        with self._lock:
            yield
            for request in [one for one in self._scheduler.parked if not self._departures.is_parked(one)]:
                self._scheduler.unpark(request)
            self._admit()
            self._outbox.say_kv_changes(self._manager)
            calls = self._handoffs.take_calls()
        for call in calls:
            call()

    # ---- commands ------------------------------------------------------------------------------------------------

    def _reserve(self, command: Reserve, session: SessionId, *, now: float) -> None:
        request, attempt = command.request, command.attempt
        known = self._requests.get(request.request_id)
        present = None if known is None else known.attempt
        standing = self._arrivals.standing(request.request_id, attempt, present=present)
        if known is not None and standing is Standing.AGAIN:
            known.session = session
            if known.has_begun:
                self._say_reserved(known)
        elif standing is Standing.STALE:
            self._outbox.refuse(session, request.request_id, attempt, NackReason.STALE, "a newer attempt was seen")
        elif standing is Standing.NEW:
            if known is not None:
                self._end(known, now=now)
            refusal = self._arrivals.refusal(
                request,
                num_tokens_in_pool=self._max_tokens - 1,
                num_tokens_ahead=1,
                num_waiting=self._scheduler.num_waiting,
                num_pending_tokens=self._scheduler.num_pending_tokens,
            )
            if refusal is not None:
                self._outbox.refuse(session, request.request_id, attempt, refusal.reason, refusal.detail)
            else:
                self._accept(command, session, now=now)

    def _accept(self, command: Reserve, session: SessionId, *, now: float) -> None:
        request = command.request
        decode_request = DecodeRequest(
            table=table_name(request.request_id, command.attempt),
            request=request,
            attempt=command.attempt,
            session=session,
            order=self._num_arrived + 1,
            deadline_at=None if command.deadline_s is None else now + command.deadline_s,
            due_at=due_at(command.deadline_s, now=now),
            keys=self._manager.keys(request.token_ids, request.cache_salt),
            slot=None if command.local_prefill else Slot(attempt=command.attempt, is_moving=command.is_moving),
            output=list(request.output_token_ids),
            told_at=now,
        )
        self._num_arrived += decode_request.num_sequences
        self._requests[request.request_id] = decode_request
        self._scheduler.add(decode_request)

    def _blocks_ready(self, message: BlocksReady, session: SessionId, *, now: float) -> None:
        request = self._requests.get(message.request_id)
        if request is None or request.attempt < message.attempt:
            self._never_reserved(message, session, now=now)
            return
        if request.slot is None or request.attempt != message.attempt:
            return
        num_wanted = self._manager.blocks_for(len(request.request.token_ids) + len(message.output))
        refused = listing.refusal(message, request, model=self._model, num_wanted=num_wanted)
        if refused is not None:
            self._nack(request, refused.reason, refused.detail)
        elif request.slot.is_moving and not self._make_room(request, message.num_listed):
            detail = f"no room for the {message.num_listed} blocks that the request has grown to"
            self._nack(request, NackReason.BUSY, detail)
        else:
            self._do(request, self._handoffs.advance(request, slots.Listed(message, self._table(request))))

    def _migrate(self, command: Migrate, session: SessionId, *, now: float) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.attempt == command.attempt:
            self._departures.begin(command, request, now=now)
        else:
            detail = f"attempt {command.attempt} is not here"
            self._outbox.refuse(session, command.request_id, command.to_attempt, NackReason.LEASE_LOST, detail)

    def _never_reserved(self, message: BlocksReady, session: SessionId, *, now: float) -> None:
        """Blocks of an attempt that is unknown here: unless it is over, its Reserve went astray and must not come."""
        request_id, attempt = message.request_id, message.attempt
        if not self._arrivals.is_over(request_id, attempt):
            detail = "blocks were listed for an attempt that was never reserved here"
            self._outbox.refuse(session, request_id, attempt, NackReason.TRANSFER_FAILED, detail)
            self._arrivals.bury(request_id, attempt, now=now)

    def _cancel(self, command: Cancel, *, now: float) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.attempt <= command.attempt:
            self._end(request, now=now)
        self._arrivals.bury(command.request_id, command.attempt, now=now)

    # ---- handoff -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        self._end_late(now=self._clock())
        for request in self._scheduler.admit():
            is_new, request.has_begun = not request.has_begun, True
            if is_new:
                self._say_reserved(request)
            if request.slot is None:
                continue
            if not self._make_room(request, len(request.slot.sealed)):
                self._nack(request, NackReason.BUSY, "no room for the blocks that the request has grown to")
                continue
            reach(Failpoint.RESERVED)
            num_cached_blocks = request.num_cached_tokens // self._manager.block_size
            granted = slots.Granted(self._table(request), num_cached_blocks)
            self._do(request, self._handoffs.advance(request, granted))

    def _table(self, request: DecodeRequest) -> tuple[BlockId, ...]:
        """The request's blocks; none while it waits."""
        return tuple(self._manager.block_ids(request.table)) if self._manager.has(request.table) else ()

    def _make_room(self, request: DecodeRequest, num_blocks: int) -> bool:
        """Let the table hold `num_blocks` blocks, if there is one; a request that moves here grows on its way."""
        try:
            if self._manager.has(request.table):
                self._manager.reserve(request.table, num_blocks * self._manager.block_size)
        except OutOfBlocks:
            return False
        return True

    def _say_reserved(self, request: DecodeRequest) -> None:
        request.told_at = self._clock()
        self._outbox.say(request.session, request.reserved())

    def _take_answer(self, request: DecodeRequest, answer: Answer) -> None:
        with self._changing():
            self._do(request, self._handoffs.take_in(request, answer))
        self.on_change()

    def _do(self, request: DecodeRequest, outcomes: Sequence[Outcome]) -> None:
        """What a handoff wants from the batch, the blocks and the router."""
        for outcome in outcomes:
            match outcome:
                case slots.Join():
                    self._join(request, outcome)
                case slots.Report(num_blocks=num_blocks):
                    self._outbox.say(request.session, request.copied(num_blocks))
                case slots.Refuse(reason=reason, detail=detail):
                    self._outbox.refuse(request.session, request.request_id, request.attempt, reason, detail)
                    self._forget(request, now=self._clock())
                case slots.GiveBack():
                    self._scheduler.remove(request)
                    if self._manager.has(request.table):
                        self._manager.free(request.table)

    def _join(self, request: DecodeRequest, join: slots.Join) -> None:
        """Every block is here and confirmed: publish them and decode behind the first token."""
        reach(Failpoint.VALIDATED)
        request.output += join.output
        self._manager.append(request.table, join.output)
        request.num_computed_tokens = request.num_tokens
        self._manager.publish(request.table, request.num_computed_tokens)
        if request.request.choices:
            self._part(request, join.first_tokens)
            return
        self._manager.append(request.table, join.first_token.token_ids)
        request.output += join.first_token.token_ids
        self._scheduler.join(request)
        self._has_joined(request)

    def _part(self, carrier: DecodeRequest, first_tokens: Sequence[Tokens]) -> None:
        """The prompt is here: the choices that go on behind their first token take the carrier's place."""
        now, forks = self._clock(), []
        for place, (choice, first) in enumerate(zip(carrier.request.outputs, first_tokens, strict=True)):
            known = self._requests.get(choice.request_id)
            present = None if known is None else known.attempt
            if self._arrivals.standing(choice.request_id, carrier.attempt, present=present) is not Standing.NEW:
                continue
            if known is not None:
                self._end(known, now=now)
            if carrier.slot is None:
                self._outbox.say(carrier.session, first)
            if first.finish_reason is None:
                forks.append(carrier.fork(choice, first, order=carrier.order + place))
                self._requests[choice.request_id] = forks[-1]
            else:
                self._arrivals.bury(choice.request_id, carrier.attempt, now=now)
        self._scheduler.part(carrier, forks)
        self._forget(carrier, now=now)
        self._manager.free(carrier.table)
        if carrier.slot is not None and forks:
            forks[0].account_for(carrier)
            for fork in forks:
                self._has_joined(fork)

    def _has_joined(self, request: DecodeRequest) -> None:
        self._outbox.say(request.session, request.joined())
        if request.num_tokens >= min(self._model.max_model_len, self._max_tokens):
            # The prefill worker's limit is longer than ours: there is no room for a single step.
            self._outbox.say(request.session, request.cut_off())
            self._end(request, now=self._clock())

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _commit(self, plan: StepPlan, result: StepResult, *, started_at: float) -> None:
        now = self._clock()
        for request in self._batch.commit(plan, result, step_s=now - started_at):
            reach(Failpoint.FINISHING)
            self._end(request, now=now)
        while self._batch.parting:
            self._part(*self._batch.parting.pop(0))
        self._outbox.say_kv_changes(self._manager)
        self._outbox.say_load(self._load())

    def _blame(self, error: Exception) -> None:
        """The engine failed. A request that was alone in the step is told that it was the cause."""
        if len(self._batch.requests) == 1:
            request = self._batch.requests[0]
            self._outbox.refuse(request.session, request.request_id, request.attempt, NackReason.INTERNAL, str(error))

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end_late(self, *, now: float) -> None:
        for request in list(self._scheduler.waiting):
            if request.is_late(now=now):
                self._nack(request, NackReason.DEADLINE, "the deadline passed while the request waited")

    def _nack(self, request: DecodeRequest, reason: NackReason, detail: str) -> None:
        self._outbox.refuse(request.session, request.request_id, request.attempt, reason, detail)
        self._end(request, now=self._clock())

    def _forget(self, request: DecodeRequest, *, now: float) -> None:
        """Remember only that this attempt is over; queues and blocks follow."""
        if request.phase is not DecodePhase.ENDED:
            request.phase = DecodePhase.ENDED
            self._departures.forget(request)
            del self._requests[request.request_id]
            self._arrivals.bury(request.request_id, request.attempt, now=now)

    def _end(self, request: DecodeRequest, *, now: float) -> None:
        """End the request wherever it is; full blocks that are published stay as cache."""
        was_pulling = request.phase is DecodePhase.PULLING
        self._forget(request, now=now)
        if was_pulling:
            # This gives the blocks back when no read writes to them.
            self._do(request, self._handoffs.advance(request, slots.Dropped()))
            return
        self._scheduler.remove(request)
        if not request.is_in_step and self._manager.has(request.table):
            self._manager.free(request.table)

    # ---- invariants ----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self._manager.check()
        self._scheduler.check()
        self._departures.check()
        scheduler = self._scheduler
        queued = [*scheduler.waiting, *scheduler.pulling, *scheduler.running, *scheduler.parked]
        alive = [one for one in queued if one.phase is not DecodePhase.ENDED]
        assert {id(one) for one in alive} == {id(one) for one in self._requests.values()}
        assert all(self._departures.is_parked(request) for request in scheduler.parked)
        for request in scheduler.running:
            assert 0 < request.num_missing_tokens <= request.num_tokens

    def _ledger(self, asker: SessionId, *, now: float) -> WorkerLedger:
        holders = unique((*self._requests.values(), *self._scheduler.pulling, *self._batch.requests))
        entries = tuple(holder(request, self._departures, self._outbox, asker=asker, now=now) for request in holders)
        return make_ledger(self._manager, entries, check=self._check)

    # ---- reports -------------------------------------------------------------------------------------------------

    def _load(self) -> WorkerLoad:
        return WorkerLoad(
            num_waiting=sum(one.num_sequences for one in (*self._scheduler.waiting, *self._scheduler.pulling)),
            num_running=len(self._scheduler.running) + len(self._scheduler.parked),
            num_pending_tokens=self._scheduler.num_pending_tokens,
            num_blocks=self._manager.num_blocks,
            num_free_blocks=self._manager.num_free,
            num_cached_blocks=self._manager.num_cached,
            num_steps=self._batch.num_steps,
            num_ticks=self._num_ticks,
            num_computed_tokens=self._batch.num_computed_tokens,
            num_pulled_blocks=self._handoffs.num_pulled_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            num_leases=len(self._departures),
            step_s=self._batch.step_s,
        )

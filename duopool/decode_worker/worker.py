"""A decode worker: takes head-room for requests, pulls their blocks from prefill workers, and decodes them together.

1. `Reserve` lets a request wait for head-room; `Reserved` tells the router when it has it. 2. Every `BlocksReady`
starts a read of the blocks that are not cached here, while the prefill worker still computes. 3. When all is read and
the prefill worker has confirmed its lease, the request joins the batch behind its first token. 4. Every step gives each
running request one token. A `Reserve` with `local_prefill` skips 2 and 3: the prefix is computed here.

Handoffs are driven by `handoff.py`; here is what they mean for queues, blocks and the router. Commands and the reader's
answers are taken while a step runs: the lock covers bookkeeping only, and the reader is called without it. A request
that ends while a step or a read may write to its blocks keeps them until that has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duopool.core.config import WorkerConfig
from duopool.core.handoff import slot as slots
from duopool.core.handoff.slot import Slot
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
    Rebind,
    Reserve,
    SnapshotWanted,
    Tokens,
    WorkerLoad,
)
from duopool.core.step import Chunk, Runner, SampledToken, StepPlan, StepResult
from duopool.core.types import FinishReason, RequestId
from duopool.core.worker import Addressed, SessionId
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest, table_name
from duopool.decode_worker.handoff import Answer, Handoffs, Outcome
from duopool.decode_worker.holder import holder
from duopool.decode_worker.scheduler import DecodeScheduler
from duopool.engine.arrivals import Arrivals, Standing
from duopool.engine.failpoints import Failpoint, reach
from duopool.engine.ledger import make_ledger, unique
from duopool.engine.next_token import next_token
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel
from duopool.engine.transfer.transport import BlockReader


class DecodeWorker:
    """Implements `core.worker.Worker`."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        model: ServedModel,
        manager: KVCacheManager,
        runner: Runner,
        reader: BlockReader,
        clock: Callable[[], float],
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called without the lock when something happened outside of handle, step and tick."""
        self._model = model
        self._manager = manager
        self._runner = runner
        self._clock = clock
        self._timers = config.handoff
        self._max_tokens = manager.num_blocks * manager.block_size + 1
        """Longest sequence the pool can bring forth: the last token needs no KV."""
        self._scheduler = DecodeScheduler(manager, config.scheduler, eos_token_ids=model.eos_token_ids)
        self._outbox = Outbox()
        self._requests: dict[RequestId, DecodeRequest] = {}
        self._arrivals = Arrivals(model, config.handoff, max_num_waiting=config.scheduler.max_num_waiting)
        self._handoffs = Handoffs(reader, on_answer=self._take_answer, clock=clock)
        self._in_step: list[DecodeRequest] = []
        self._num_arrived = 0
        self._num_steps = 0
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
        with self._changing():
            self._outbox.heard(session, now=now)
            match command:
                case Reserve():
                    self._reserve(command, session, now=now)
                case BlocksReady():
                    self._blocks_ready(command, session, now=now)
                case Cancel():
                    self._cancel(command, now=now)
                case SnapshotWanted():
                    self._outbox.say_kv_snapshot(session, self._manager)
                case LedgerWanted(audit_id=audit_id):
                    self._outbox.say(session, LedgerReport(audit_id=audit_id, ledger=self._ledger(session, now=now)))
                case Prefill(request=request, attempt=attempt):
                    self._outbox.refuse(
                        session, request.request_id, attempt, NackReason.INTERNAL, "this worker decodes"
                    )
                case Heartbeat() | Rebind():
                    pass  # a sign of life; leases are a prefill worker's

    def step(self, *, now: float) -> bool:
        with self._changing():
            self._end_late(now=now)
            self._admit()
            plan = self._schedule()
        if plan.is_empty:
            return False
        try:
            result = self._runner.execute(plan)
            reach(Failpoint.DECODING)
        except Exception as error:
            with self._lock:
                self._blame(error)
            raise
        with self._changing():
            self._commit(plan, result, started_at=now)
        return True

    def tick(self, *, now: float) -> None:
        with self._changing():
            self._end_late(now=now)
            for request in list(self._requests.values()):
                if self._outbox.is_silent(request.session, now=now, limit_s=self._timers.orphan_ttl_s):
                    self._nack(request, NackReason.STALE, "the router was silent for too long")
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
            return not self._requests and not self._scheduler.pulling and not self._in_step

    def drain(self) -> None:
        """Refuse new requests from now on; those that are here go on."""
        with self._lock:
            self._arrivals.drain()

    def check(self) -> None:
        with self._lock:
            self._check()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; let what was freed be taken and what happened be told; then make the reader's calls."""
        with self._lock:
            yield
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
                self._outbox.say(session, known.reserved())
        elif standing is Standing.STALE:
            self._outbox.refuse(session, request.request_id, attempt, NackReason.STALE, "a newer attempt was seen")
        elif standing is Standing.NEW:
            if known is not None:
                self._end(known, now=now)
            refusal = self._arrivals.refusal(
                request.token_ids,
                num_tokens_in_pool=self._max_tokens - 1,
                num_tokens_ahead=1,
                num_waiting=len(self._scheduler.waiting),
            )
            if refusal is not None:
                self._outbox.refuse(session, request.request_id, attempt, refusal.reason, refusal.detail)
            else:
                self._accept(command, session, now=now)

    def _accept(self, command: Reserve, session: SessionId, *, now: float) -> None:
        request = command.request
        self._num_arrived += 1
        decode_request = DecodeRequest(
            table=table_name(request.request_id, command.attempt),
            request=request,
            attempt=command.attempt,
            session=session,
            order=self._num_arrived,
            deadline_at=None if command.deadline_s is None else now + command.deadline_s,
            keys=self._manager.keys(request.token_ids, request.cache_salt),
            slot=None if command.local_prefill else Slot(attempt=command.attempt),
            output=list(request.output_token_ids),
        )
        self._requests[request.request_id] = decode_request
        self._scheduler.add(decode_request)

    def _blocks_ready(self, message: BlocksReady, session: SessionId, *, now: float) -> None:
        request = self._requests.get(message.request_id)
        if request is None or request.attempt < message.attempt:
            self._never_reserved(message, session, now=now)
            return
        if request.slot is None or request.attempt != message.attempt:
            return
        num_listed = message.first_block + len(message.blocks)
        if num_listed > self._manager.blocks_for(len(request.request.token_ids)):
            self._nack(request, NackReason.TRANSFER_FAILED, f"{num_listed} blocks are more than the prefix has")
            return
        if request.has_begun:
            reach(Failpoint.RESERVED)
        self._do(request, self._handoffs.advance(request, slots.Listed(message)))

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
        for request in self._scheduler.admit():
            is_new, request.has_begun = not request.has_begun, True
            if is_new:
                self._outbox.say(request.session, request.reserved())
            if request.slot is not None:
                num_cached_blocks = request.num_cached_tokens // self._manager.block_size
                blocks = tuple(self._manager.block_ids(request.table))
                self._do(request, self._handoffs.advance(request, slots.Granted(blocks, num_cached_blocks)))

    def _take_answer(self, request: DecodeRequest, answer: Answer) -> None:
        with self._changing():
            self._do(request, self._handoffs.take_in(request, answer))
        self.on_change()

    def _do(self, request: DecodeRequest, outcomes: Sequence[Outcome]) -> None:
        """What a handoff wants from the batch, the blocks and the router."""
        for outcome in outcomes:
            match outcome:
                case slots.Join(first_token=first_token):
                    self._join(request, first_token)
                case slots.Refuse(reason=reason, detail=detail):
                    self._outbox.refuse(request.session, request.request_id, request.attempt, reason, detail)
                    self._forget(request, now=self._clock())
                case slots.GiveBack():
                    self._scheduler.remove(request)
                    if self._manager.has(request.table):
                        self._manager.free(request.table)

    def _join(self, request: DecodeRequest, first_token: Tokens) -> None:
        """Every block is here and confirmed: publish them and decode behind the first token."""
        reach(Failpoint.VALIDATED)
        request.num_computed_tokens = request.num_tokens
        self._manager.publish(request.table, request.num_computed_tokens)
        self._manager.append(request.table, first_token.token_ids)
        request.output += first_token.token_ids
        self._scheduler.join(request)
        self._outbox.say(request.session, request.joined())
        if request.num_tokens >= min(self._model.max_model_len, self._max_tokens):
            # The prefill worker's limit is longer than ours: there is no room for a single step.
            last = Tokens(
                request_id=request.request_id,
                attempt=request.attempt,
                index=len(request.output),
                token_ids=(),
                finish_reason=FinishReason.LENGTH,
            )
            self._outbox.say(request.session, last)
            self._end(request, now=self._clock())

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _schedule(self) -> StepPlan:
        plan = self._scheduler.schedule()
        by_table = {request.table: request for request in self._scheduler.running}
        self._in_step = [by_table[chunk.request_id] for chunk in plan.chunks]
        for request in self._in_step:
            request.is_in_step = True
        return plan

    def _commit(self, plan: StepPlan, result: StepResult, *, started_at: float) -> None:
        now = self._clock()
        requests, self._in_step = self._in_step, []
        self._num_steps += 1
        self._num_computed_tokens += plan.num_tokens
        self._step_s = now - started_at
        for request, chunk in zip(requests, plan.chunks, strict=True):
            request.is_in_step = False
            self._commit_chunk(request, chunk, result, now=now)
        self._outbox.say_kv_changes(self._manager)
        self._outbox.say_load(self._load())

    def _commit_chunk(self, request: DecodeRequest, chunk: Chunk, result: StepResult, *, now: float) -> None:
        request.num_computed_tokens += len(chunk.token_ids)
        self._manager.publish(request.table, request.num_computed_tokens)
        if request.phase is DecodePhase.ENDED:
            self._manager.free(request.table)
            return
        request.prompt_logprobs += result.prompt_logprobs.get(request.table, ())
        if chunk.sample is not None:
            self._emit(request, result.tokens[request.table], now=now)

    def _emit(self, request: DecodeRequest, sampled: SampledToken, *, now: float) -> None:
        """Append the new token and tell the router; the request ends if this was its last."""
        request.output.append(sampled.token_id)
        self._manager.append(request.table, (sampled.token_id,))
        tokens = next_token(
            self._model,
            request.request,
            sampled,
            attempt=request.attempt,
            index=len(request.output) - 1,
            max_tokens=self._max_tokens,
            prompt_logprobs=request.prompt_logprobs,
        )
        request.prompt_logprobs.clear()
        self._outbox.say(request.session, tokens)
        if tokens.finish_reason is not None:
            reach(Failpoint.FINISHING)
            self._end(request, now=now)

    def _blame(self, error: Exception) -> None:
        """The engine failed. A request that was alone in the step is told that it was the cause."""
        if len(self._in_step) == 1:
            request = self._in_step[0]
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
        queued = [*self._scheduler.waiting, *self._scheduler.pulling, *self._scheduler.running]
        alive = [one for one in queued if one.phase is not DecodePhase.ENDED]
        assert {id(one) for one in alive} == {id(one) for one in self._requests.values()}
        for request in self._scheduler.running:
            assert 0 < request.num_missing_tokens <= request.num_tokens

    def _ledger(self, asker: SessionId, *, now: float) -> WorkerLedger:
        holders = unique((*self._requests.values(), *self._scheduler.pulling, *self._in_step))
        entries = tuple(holder(request, self._outbox, asker=asker, now=now) for request in holders)
        return make_ledger(self._manager, entries, check=self._check)

    # ---- reports -------------------------------------------------------------------------------------------------

    def _load(self) -> WorkerLoad:
        return WorkerLoad(
            num_waiting=len(self._scheduler.waiting) + len(self._scheduler.pulling),
            num_running=len(self._scheduler.running),
            num_pending_tokens=self._scheduler.num_pending_tokens,
            num_blocks=self._manager.num_blocks,
            num_free_blocks=self._manager.num_free,
            num_cached_blocks=self._manager.num_cached,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_pulled_blocks=self._handoffs.num_pulled_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            step_s=self._step_s,
        )

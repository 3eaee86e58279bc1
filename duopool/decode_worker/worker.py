"""A decode worker: takes head-room for requests, pulls their blocks from prefill workers, and decodes them together.

1. `Reserve` lets a request wait for head-room; `Reserved` tells the router when it has it. 2. Every `BlocksReady`
starts a read of the blocks that are not cached here, while the prefill worker still computes. 3. When all is read and
the prefill worker has confirmed its lease, the request joins the batch behind its first token. 4. Every step gives each
running request one token. A `Reserve` with `local_prefill` skips 2 and 3: the prefix is computed here.

What a handoff does next is decided in `core/handoff/slot.py`; this module carries it out. Commands and the reader's
answers are taken while a step runs: the lock covers bookkeeping only, and the reader is called without it. A request
that ends while a step or a read may write to its blocks keeps them until that has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from duopool.core.config import WorkerConfig
from duopool.core.handoff import slot as slots
from duopool.core.handoff.slot import Slot, SlotEvent
from duopool.core.handoff.tombstones import Tombstones
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    Joined,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    SnapshotWanted,
    Tokens,
    Verdict,
    WorkerLoad,
)
from duopool.core.step import Chunk, Runner, SampledToken, StepPlan, StepResult
from duopool.core.types import FinishReason, RequestId
from duopool.core.worker import Addressed, SessionId
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest, table_name
from duopool.decode_worker.scheduler import DecodeScheduler
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel
from duopool.engine.transfer.transport import BlockReader, ReadOutcome

BUSY_RETRY_AFTER_S = 0.5


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
        self._reader = reader
        self._clock = clock
        self._limits = config.scheduler
        self._timers = config.handoff
        self._max_tokens = manager.num_blocks * manager.block_size + 1
        """Longest sequence the pool can bring forth: the last token needs no KV."""
        self._scheduler = DecodeScheduler(manager, config.scheduler, eos_token_ids=model.eos_token_ids)
        self._outbox = Outbox()
        self._requests: dict[RequestId, DecodeRequest] = {}
        ttl_s = max(self._timers.lease_ttl_s, self._timers.orphan_ttl_s)
        self._tombstones = Tombstones(keep_s=2 * ttl_s)
        self._in_step: list[DecodeRequest] = []
        self._calls: list[Callable[[], None]] = []
        """Calls of the reader that are to be made when the lock is let go."""
        self._num_arrived = 0
        self._is_draining = False
        self._num_steps = 0
        self._num_computed_tokens = 0
        self._num_pulled_blocks = 0
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
                    self._blocks_ready(command)
                case Cancel():
                    self._cancel(command, now=now)
                case SnapshotWanted():
                    self._outbox.say_kv_snapshot(session, self._manager)
                case Prefill(request=request, attempt=attempt):
                    self._refuse(session, request.request_id, attempt, NackReason.INTERNAL, "this worker decodes")
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
            self._tombstones.sweep(now=now)
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
            self._is_draining = True

    def check(self) -> None:
        with self._lock:
            self._manager.check()
            self._scheduler.check()
            queued = [*self._scheduler.waiting, *self._scheduler.pulling, *self._scheduler.running]
            alive = [one for one in queued if one.phase is not DecodePhase.ENDED]
            assert {id(one) for one in alive} == {id(one) for one in self._requests.values()}
            for request in self._scheduler.running:
                assert 0 < request.num_missing_tokens <= request.num_tokens

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; let what was freed be taken and what happened be told; then make the reader's calls."""
        with self._lock:
            yield
            self._admit()
            self._outbox.say_kv_changes(self._manager)
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    # ---- commands ------------------------------------------------------------------------------------------------

    def _reserve(self, command: Reserve, session: SessionId, *, now: float) -> None:
        request, attempt = command.request, command.attempt
        known = self._requests.get(request.request_id)
        if known is not None and known.attempt == attempt:
            known.session = session
            if known.has_begun:
                self._say_reserved(known)
            return
        is_old = known is not None and known.attempt > attempt
        if is_old or self._tombstones.covers(request.request_id, attempt + 1):
            self._refuse(session, request.request_id, attempt, NackReason.STALE, "a newer attempt was seen")
            return
        if self._tombstones.covers(request.request_id, attempt):
            return
        if known is not None:
            self._end(known, now=now)
        refusal = self._model.refusal(request.token_ids, num_tokens_in_pool=self._max_tokens - 1, num_tokens_ahead=1)
        if refusal is not None:
            self._refuse(session, request.request_id, attempt, refusal.reason, refusal.detail)
        elif self._is_draining:
            self._refuse(session, request.request_id, attempt, NackReason.DRAINING, "the worker is draining")
        elif len(self._scheduler.waiting) >= self._limits.max_num_waiting:
            detail = f"{len(self._scheduler.waiting)} requests are waiting"
            self._refuse(session, request.request_id, attempt, NackReason.BUSY, detail)
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

    def _blocks_ready(self, message: BlocksReady) -> None:
        request = self._requests.get(message.request_id)
        if request is None or request.slot is None or request.attempt != message.attempt:
            return
        num_listed = message.first_block + len(message.blocks)
        if num_listed > self._manager.blocks_for(len(request.request.token_ids)):
            self._nack(request, NackReason.TRANSFER_FAILED, f"{num_listed} blocks are more than the prefix has")
            return
        self._advance(request, slots.Listed(message))

    def _cancel(self, command: Cancel, *, now: float) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.attempt <= command.attempt:
            self._end(request, now=now)
        self._tombstones.bury(command.request_id, command.attempt, now=now)

    # ---- handoff -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for request in self._scheduler.admit():
            is_new, request.has_begun = not request.has_begun, True
            if is_new:
                self._say_reserved(request)
            if request.slot is not None:
                num_cached_blocks = request.num_cached_tokens // self._manager.block_size
                blocks = tuple(self._manager.block_ids(request.table))
                self._advance(request, slots.Granted(blocks, num_cached_blocks))

    def _advance(self, request: DecodeRequest, event: SlotEvent) -> None:
        """Let the slot see an event, and do what it says."""
        if request.slot is None:
            return
        before = request.slot.num_reads
        request.slot, actions = slots.transition(request.slot, event)
        self._clock_reads(request, before, request.slot.num_reads)
        for action in actions:
            match action:
                case slots.Read():
                    self._calls.append(partial(self._read, request, action))
                case slots.Confirm(lease=lease):
                    done = partial(self._on_verdict, request)
                    self._calls.append(partial(self._reader.confirm, lease, request.attempt, done))
                case slots.Join(first_token=first_token):
                    self._join(request, first_token)
                case slots.Refuse(reason=reason, detail=detail):
                    self._refuse(request.session, request.request_id, request.attempt, reason, detail)
                    self._forget(request, now=self._clock())
                case slots.GiveBack():
                    self._scheduler.remove(request)
                    if self._manager.has(request.table):
                        self._manager.free(request.table)

    def _clock_reads(self, request: DecodeRequest, before: int, after: int) -> None:
        """Count the time in which at least one read is under way."""
        if before == 0 and after > 0:
            request.reading_since = self._clock()
        elif before > 0 and after == 0:
            request.transfer_s += self._clock() - request.reading_since

    def _read(self, request: DecodeRequest, read: slots.Read) -> None:
        done = partial(self._on_read, request, len(read.sources))
        self._reader.read(read.lease, request.attempt, read.sources, read.targets, done)

    def _on_read(self, request: DecodeRequest, num_blocks: int, outcome: ReadOutcome) -> None:
        with self._changing():
            if not outcome.error:
                request.num_pulled_blocks += num_blocks
                request.num_pulled_bytes += outcome.num_bytes
                self._num_pulled_blocks += num_blocks
            self._advance(request, slots.ReadEnded(outcome.error))
        self.on_change()

    def _on_verdict(self, request: DecodeRequest, verdict: Verdict) -> None:
        with self._changing():
            self._advance(request, slots.Validated(verdict.ok, verdict.reason))
        self.on_change()

    def _join(self, request: DecodeRequest, first_token: Tokens) -> None:
        """Every block is here and confirmed: publish them and decode behind the first token."""
        request.num_computed_tokens = request.num_tokens
        self._manager.publish(request.table, request.num_computed_tokens)
        self._manager.append(request.table, first_token.token_ids)
        request.output += first_token.token_ids
        self._scheduler.join(request)
        joined = Joined(
            request_id=request.request_id,
            attempt=request.attempt,
            num_pulled_blocks=request.num_pulled_blocks,
            num_pulled_bytes=request.num_pulled_bytes,
            transfer_s=request.transfer_s,
        )
        self._outbox.say(request.session, joined)
        if request.num_tokens >= min(self._model.max_model_len, self._max_tokens):
            # The prefill worker's limit is longer than ours: there is no room for a single step.
            self._say_tokens(request, (), FinishReason.LENGTH)
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
        ending = self._model.ending(
            request.request.params,
            sampled.token_id,
            num_output_tokens=len(request.output),
            num_tokens=request.num_tokens,
            max_tokens=self._max_tokens,
        )
        tokens = Tokens(
            request_id=request.request_id,
            attempt=request.attempt,
            index=len(request.output) - 1,
            token_ids=(sampled.token_id,),
            finish_reason=None if ending is None else ending.reason,
            stop_token_id=None if ending is None else ending.stop_token_id,
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            prompt_logprobs=tuple(request.prompt_logprobs),
        )
        request.prompt_logprobs.clear()
        self._outbox.say(request.session, tokens)
        if ending is not None:
            self._end(request, now=now)

    def _blame(self, error: Exception) -> None:
        """The engine failed. A request that was alone in the step is told that it was the cause."""
        if len(self._in_step) == 1:
            request = self._in_step[0]
            self._refuse(request.session, request.request_id, request.attempt, NackReason.INTERNAL, str(error))

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end_late(self, *, now: float) -> None:
        for request in list(self._scheduler.waiting):
            if request.is_late(now=now):
                self._nack(request, NackReason.DEADLINE, "the deadline passed while the request waited")

    def _nack(self, request: DecodeRequest, reason: NackReason, detail: str) -> None:
        self._refuse(request.session, request.request_id, request.attempt, reason, detail)
        self._end(request, now=self._clock())

    def _forget(self, request: DecodeRequest, *, now: float) -> None:
        """Remember only that this attempt is over; queues and blocks follow."""
        if request.phase is not DecodePhase.ENDED:
            request.phase = DecodePhase.ENDED
            del self._requests[request.request_id]
            self._tombstones.bury(request.request_id, request.attempt, now=now)

    def _end(self, request: DecodeRequest, *, now: float) -> None:
        """End the request wherever it is; full blocks that are published stay as cache."""
        was_pulling = request.phase is DecodePhase.PULLING
        self._forget(request, now=now)
        if was_pulling:
            self._advance(request, slots.Dropped())  # gives the blocks back when no read writes to them
            return
        self._scheduler.remove(request)
        if not request.is_in_step and self._manager.has(request.table):
            self._manager.free(request.table)

    # ---- reports -------------------------------------------------------------------------------------------------

    def _say_reserved(self, request: DecodeRequest) -> None:
        reserved = Reserved(
            request_id=request.request_id, attempt=request.attempt, num_cached_tokens=request.num_cached_tokens
        )
        self._outbox.say(request.session, reserved)

    def _say_tokens(
        self, request: DecodeRequest, token_ids: tuple[int, ...], finish_reason: FinishReason | None
    ) -> None:
        tokens = Tokens(
            request_id=request.request_id,
            attempt=request.attempt,
            index=len(request.output),
            token_ids=token_ids,
            finish_reason=finish_reason,
        )
        self._outbox.say(request.session, tokens)

    def _refuse(self, session: SessionId, request_id: RequestId, attempt: int, reason: NackReason, detail: str) -> None:
        retry_after_s = BUSY_RETRY_AFTER_S if reason is NackReason.BUSY else 0.0
        nack = Nack(request_id=request_id, attempt=attempt, reason=reason, detail=detail, retry_after_s=retry_after_s)
        self._outbox.say(session, nack)

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
            num_pulled_blocks=self._num_pulled_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            step_s=self._step_s,
        )

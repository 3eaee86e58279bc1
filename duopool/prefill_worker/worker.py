"""A prefill worker: computes prompts chunk by chunk, and keeps their blocks under a lease until they are read.

1. `Prefill` puts a request into the queue. 2. `step` computes chunks; after each one the finished blocks are sealed and
listed in a `BlocksReady`, the last of which carries the first token. 3. The lease, made with the first `BlocksReady`,
holds until a decode worker has validated its read, or until it is cancelled or its time is over; then the blocks are
cache.

Commands and the KV source's questions are answered while a step runs: the lock covers bookkeeping only. A request that
ends while a step writes to its blocks keeps them until the step has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from duopool.core.config import WorkerConfig
from duopool.core.handoff import lease as leases
from duopool.core.handoff.lease import Lease
from duopool.core.handoff.tombstones import Tombstones
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    LeaseRef,
    Nack,
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
from duopool.core.step import Chunk, Runner, StepPlan, StepResult
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from duopool.core.worker import Addressed, SessionId
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel
from duopool.prefill_worker.prefill_request import PrefillPhase, PrefillRequest, table_name
from duopool.prefill_worker.scheduler import PrefillScheduler
from duopool.prefill_worker.sealing import SealBlocks, Sealer

BUSY_RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIdentity:
    """Who this worker is to decode workers."""

    worker_id: WorkerId
    incarnation: Incarnation
    source_address: str
    """host:port of the KV source service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Time, randomness and tensors, as the worker sees them."""

    seal: SealBlocks
    new_lease_id: Callable[[], LeaseId]
    """Ids that were never used before, by any life of any worker."""
    clock: Callable[[], float]
    """The clock that every `now` is taken from."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What a running step does for one request."""

    request: PrefillRequest
    chunk: Chunk
    finished: tuple[BlockId, ...]
    """Blocks that are finished after the step and not listed yet."""
    generations: tuple[int, ...]


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
        self._identity = identity
        self._model = model
        self._manager = manager
        self._runner = runner
        self._sealer = Sealer(surroundings.seal)
        self._new_lease_id = surroundings.new_lease_id
        self._clock = surroundings.clock
        self._limits = config.scheduler
        self._timers = config.handoff
        self._scheduler = PrefillScheduler(manager, config.scheduler, eos_token_ids=model.eos_token_ids)
        self._outbox = Outbox()
        self._requests: dict[RequestId, PrefillRequest] = {}
        self._leased: dict[LeaseId, PrefillRequest] = {}
        """Requests with a lease, those included whose revoked lease still has readers."""
        ttl_s = max(self._timers.lease_ttl_s, self._timers.orphan_ttl_s)
        self._tombstones = Tombstones(keep_s=2 * ttl_s)
        self._in_step: list[_Stretch] = []
        """What the step that runs now does."""
        self._is_draining = False
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
                        self._extend(self._leased.get(lease_id), now=now)
                case SnapshotWanted():
                    self._outbox.say_kv_snapshot(session, self._manager)
                case Reserve(request=request, attempt=attempt):
                    self._refuse(session, request.request_id, attempt, NackReason.INTERNAL, "this worker prefills")
                case BlocksReady():
                    pass  # meant for a decode worker
            self._outbox.say_kv_changes(self._manager)

    def step(self, *, now: float) -> bool:
        with self._lock:
            plan, stretches = self._schedule(now=now)
        if plan.is_empty:
            return False
        try:
            result = self._runner.execute(plan)
            sealed = [self._sealer.seal(stretch.finished, stretch.generations) for stretch in stretches]
        except Exception as error:
            with self._lock:
                self._blame(stretches, error)
            raise
        with self._lock:
            self._commit(stretches, result, sealed, started_at=now)
        return True

    def tick(self, *, now: float) -> None:
        with self._lock:
            self._end_late(now=now)
            for request in list(self._requests.values()):
                self._sweep(request, now=now)
            self._tombstones.sweep(now=now)
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
            return not self._requests and not self._leased and not self._in_step

    def drain(self) -> None:
        """Refuse new requests from now on; those that are here go on."""
        with self._lock:
            self._is_draining = True

    def check(self) -> None:
        with self._lock:
            self._manager.check()
            self._scheduler.check()
            for request in self._requests.values():
                assert request.phase is not PrefillPhase.ENDED
                assert (request.phase is PrefillPhase.WAITING) != self._manager.has(request.table)
                assert request.phase is not PrefillPhase.LEASED or request.lease is not None
            for lease_id, request in self._leased.items():
                assert request.lease is not None
                assert request.lease.lease_id == lease_id
                assert self._manager.has(request.table)
                assert request.phase is not PrefillPhase.ENDED or request.lease.num_readers or request.is_in_step

    # ---- LeaseKeeper ---------------------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks) -> str:
        """Count a read that this process serves itself; the answer is a refusal or empty."""
        with self._lock:
            request = self._leased.get(read.lease_id)
            refusal = self._why_not(request, read.incarnation, read.attempt)
            if refusal or request is None or request.lease is None:
                return refusal
            if not set(read.blocks) <= set(request.lease.blocks):
                return "a block is not under this lease"
            request.lease = leases.begin_read(request.lease)
            return ""

    def end_read(self, lease_id: LeaseId) -> None:
        """The counted read has ended."""
        with self._lock:
            request = self._leased.get(lease_id)
            if request is None or request.lease is None:
                return
            request.lease = leases.end_read(request.lease)
            self._free_if_possible(request)
        self.on_change()

    def validate(self, validate: Validate) -> Verdict:
        """Whether the lease still holds for this attempt and every generation is unchanged; may also end it."""
        with self._lock:
            request = self._leased.get(validate.lease_id)
            refusal = self._why_not(request, validate.incarnation, validate.attempt)
            if refusal or request is None or request.lease is None:
                return Verdict(ok=False, reason=refusal)
            for sealed in request.lease.blocks:
                if self._manager.generation(sealed.block_id) != sealed.generation:
                    return Verdict(ok=False, reason=f"block {sealed.block_id} has been given to another request")
            if validate.release and request.phase is PrefillPhase.LEASED:
                self._end(request, now=self._clock())
                self._outbox.say_kv_changes(self._manager)
        self.on_change()
        return Verdict(ok=True)

    def _why_not(self, request: PrefillRequest | None, incarnation: Incarnation, attempt: int) -> str:
        if incarnation != self._identity.incarnation:
            return "the lease is of another incarnation"
        lease = None if request is None else request.lease
        return leases.refusal(lease, attempt=attempt, now=self._clock())

    # ---- commands ------------------------------------------------------------------------------------------------

    def _prefill(self, command: Prefill, session: SessionId, *, now: float) -> None:
        request, attempt = command.request, command.attempt
        known = self._requests.get(request.request_id)
        if known is not None and known.attempt == attempt:
            self._answer_again(known, session)
            return
        is_old = known is not None and known.attempt > attempt
        if is_old or self._tombstones.covers(request.request_id, attempt + 1):
            self._refuse(session, request.request_id, attempt, NackReason.STALE, "a newer attempt was seen")
            return
        if self._tombstones.covers(request.request_id, attempt):
            return
        if known is not None:
            self._end(known, now=now)
        refusal = self._model.refusal(
            request.token_ids,
            num_tokens_in_pool=self._manager.num_blocks * self._manager.block_size,
            num_tokens_ahead=0,
        )
        if refusal is not None:
            self._refuse(session, request.request_id, attempt, refusal.reason, refusal.detail)
        elif self._is_draining:
            self._refuse(session, request.request_id, attempt, NackReason.DRAINING, "the worker is draining")
        elif len(self._scheduler.waiting) >= self._limits.max_num_waiting:
            detail = f"{len(self._scheduler.waiting)} requests are waiting"
            self._refuse(session, request.request_id, attempt, NackReason.BUSY, detail)
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
            token_ids=token_ids,
            keys=self._manager.keys(token_ids, command.request.cache_salt),
        )
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def _answer_again(self, request: PrefillRequest, session: SessionId) -> None:
        """The same command once more, maybe over a new session: say again what was said."""
        request.session = session
        if request.phase is not PrefillPhase.WAITING:
            self._say_accepted(request)
            for message in request.ready:
                self._outbox.say(session, message)

    def _cancel(self, command: Cancel, *, now: float) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.attempt <= command.attempt:
            self._end(request, now=now)
        self._tombstones.bury(command.request_id, command.attempt, now=now)

    def _rebind(self, command: Rebind, session: SessionId) -> None:
        request = self._requests.get(command.request_id)
        if request is not None and request.lease is not None and request.lease.lease_id == command.lease_id:
            request.lease = leases.rebind(request.lease, command.attempt)
            request.attempt = request.lease.attempt
            request.session = session
        elif not self._tombstones.covers(command.request_id, command.attempt):
            self._refuse(session, command.request_id, command.attempt, NackReason.LEASE_LOST, "unknown lease")

    def _extend(self, request: PrefillRequest | None, *, now: float) -> None:
        if request is not None and request.lease is not None:
            request.lease = leases.extend(request.lease, now=now, ttl_s=self._timers.lease_ttl_s)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _schedule(self, *, now: float) -> tuple[StepPlan, list[_Stretch]]:
        self._end_late(now=now)
        plan, begun = self._scheduler.schedule(now=now)
        for request in begun:
            self._say_accepted(request)
        by_table = {request.table: request for request in self._scheduler.filling}
        self._in_step = [self._stretch(by_table[chunk.request_id], chunk) for chunk in plan.chunks]
        self._outbox.say_kv_changes(self._manager)
        return plan, self._in_step

    def _stretch(self, request: PrefillRequest, chunk: Chunk) -> _Stretch:
        request.is_in_step = True
        end = chunk.start + len(chunk.token_ids)
        num_finished = end // self._manager.block_size
        if end == request.num_tokens:
            num_finished = self._manager.blocks_for(end)
        finished = tuple(chunk.block_ids[request.num_listed_blocks : num_finished])
        generations = tuple(self._manager.generation(block_id) for block_id in finished)
        return _Stretch(request, chunk, finished, generations)

    def _commit(
        self,
        stretches: list[_Stretch],
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
            request, num_tokens = stretch.request, len(stretch.chunk.token_ids)
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
                self._list(request, blocks, None, now=now)
        self._report()

    def _finish(
        self, request: PrefillRequest, blocks: tuple[SealedBlock, ...], result: StepResult, *, now: float
    ) -> None:
        """The whole prefix is computed: hand the first token out, and the blocks if more tokens are to follow."""
        sampled = result.tokens[request.table]
        index = len(request.request.output_token_ids)
        ending = self._model.ending(
            request.request.params,
            sampled.token_id,
            num_output_tokens=index + 1,
            num_tokens=request.num_tokens + 1,
            max_tokens=self._model.max_model_len,
        )
        first_token = Tokens(
            request_id=request.request_id,
            attempt=request.attempt,
            index=index,
            token_ids=(sampled.token_id,),
            finish_reason=None if ending is None else ending.reason,
            stop_token_id=None if ending is None else ending.stop_token_id,
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            prompt_logprobs=tuple(request.prompt_logprobs),
        )
        if ending is None:
            self._scheduler.remove(request)
            self._list(request, blocks, first_token, now=now)
            request.phase = PrefillPhase.LEASED
        else:
            self._list(request, (), first_token, now=now)
            self._end(request, now=now)

    def _list(
        self, request: PrefillRequest, blocks: tuple[SealedBlock, ...], first_token: Tokens | None, *, now: float
    ) -> None:
        """Put blocks under the request's lease and tell the router of them."""
        if request.lease is None:
            lease = Lease(
                lease_id=self._new_lease_id(),
                request_id=request.request_id,
                attempt=request.attempt,
                expires_at=now + self._timers.lease_ttl_s,
            )
            self._leased[lease.lease_id] = request
        else:
            lease = leases.extend(request.lease, now=now, ttl_s=self._timers.lease_ttl_s)
        request.lease = leases.seal(lease, blocks)
        message = BlocksReady(
            request_id=request.request_id,
            attempt=request.attempt,
            lease=LeaseRef(
                lease_id=lease.lease_id,
                worker_id=self._identity.worker_id,
                incarnation=self._identity.incarnation,
                source_address=self._identity.source_address,
            ),
            first_block=request.num_listed_blocks,
            blocks=blocks,
            first_token=first_token,
            queue_s=request.started_at - request.arrived_at,
            prefill_s=now - request.started_at,
            num_cached_tokens=request.num_cached_tokens,
        )
        request.num_listed_blocks += len(blocks)
        request.ready.append(message)
        self._outbox.say(request.session, message)

    def _blame(self, stretches: list[_Stretch], error: Exception) -> None:
        """The engine failed. A request that was alone in the step is told that it was the cause."""
        if len(stretches) == 1:
            request = stretches[0].request
            self._refuse(request.session, request.request_id, request.attempt, NackReason.INTERNAL, str(error))

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end_late(self, *, now: float) -> None:
        for request in [*self._scheduler.waiting, *self._scheduler.filling]:
            if request.is_late(now=now):
                self._nack(request, NackReason.DEADLINE, "the deadline passed before the prompt was computed", now=now)

    def _sweep(self, request: PrefillRequest, *, now: float) -> None:
        """Let time act on one request: a lease runs out, a silent router's prompt is given up."""
        if request.phase is PrefillPhase.LEASED and request.lease is not None:
            if leases.expire(request.lease, now=now).revoked:
                self._end(request, now=now)
        elif self._outbox.is_silent(request.session, now=now, limit_s=self._timers.orphan_ttl_s):
            self._nack(request, NackReason.STALE, "the router was silent for too long", now=now)
        else:
            self._extend(request, now=now)

    def _nack(self, request: PrefillRequest, reason: NackReason, detail: str, *, now: float) -> None:
        self._refuse(request.session, request.request_id, request.attempt, reason, detail)
        self._end(request, now=now)

    def _end(self, request: PrefillRequest, *, now: float) -> None:
        """Forget the request and remember that this attempt is over; its full blocks stay as cache."""
        self._scheduler.remove(request)
        request.phase = PrefillPhase.ENDED
        del self._requests[request.request_id]
        self._tombstones.bury(request.request_id, request.attempt, now=now)
        if request.lease is not None:
            request.lease = leases.revoke(request.lease)
        self._free_if_possible(request)

    def _free_if_possible(self, request: PrefillRequest) -> None:
        """Close the table of an ended request once neither a step nor a counted read needs it."""
        if request.phase is not PrefillPhase.ENDED or request.is_in_step:
            return
        if request.lease is not None:
            if not request.lease.may_be_freed:
                return
            self._leased.pop(request.lease.lease_id, None)
        if self._manager.has(request.table):
            self._manager.free(request.table)

    # ---- reports -------------------------------------------------------------------------------------------------

    def _say_accepted(self, request: PrefillRequest) -> None:
        self._outbox.say(
            request.session,
            Accepted(
                request_id=request.request_id,
                attempt=request.attempt,
                num_cached_tokens=request.num_cached_tokens,
            ),
        )

    def _refuse(self, session: SessionId, request_id: RequestId, attempt: int, reason: NackReason, detail: str) -> None:
        retry_after_s = BUSY_RETRY_AFTER_S if reason is NackReason.BUSY else 0.0
        nack = Nack(request_id=request_id, attempt=attempt, reason=reason, detail=detail, retry_after_s=retry_after_s)
        self._outbox.say(session, nack)

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
            num_computed_tokens=self._num_computed_tokens,
            num_leases=len(self._leased),
            step_s=self._step_s,
        )

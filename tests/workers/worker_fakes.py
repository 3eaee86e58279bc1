"""Fakes for worker tests: KV pages that hold token ids, a runner that proves them, a reader that is told when to act.

The runner's next token is a hash of what the pages say, not of what the plan says: if any page of a request held
anything but its own prefix, the stream would differ from `expected_stream`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

from duopool.core.audit import audit_worker
from duopool.core.config import HandoffConfig, SchedulerConfig, WorkerConfig
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Event,
    GenerationRequest,
    Heartbeat,
    KvChanged,
    KvSnapshot,
    LeaseRef,
    LedgerReport,
    LedgerWanted,
    Nack,
    Prefill,
    ReadBlocks,
    Reserve,
    SealedBlock,
    Tokens,
    Validate,
    Verdict,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import NO_TOKEN, Chunk, SampledToken, SampleSpec, StepPlan, StepResult
from duopool.core.types import BlockId, BlockKey, Incarnation, LeaseId, RequestId, Role, TokenLogprob, WorkerId
from duopool.core.worker import SessionId
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.transport import LeaseKeeper, ReadOutcome
from duopool.prefill_worker.worker import PrefillWorker

BLOCK_SIZE = 4
VOCAB_SIZE = 50
EOS = 7
ADDRESS = "p:1"
ROUTER = SessionId(1)


class Clock:
    """Our own time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """The model: the token that follows `token_ids`."""
    digest = blake2b(repr((list(token_ids), seed)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_stream(prompt: Sequence[int], params: SamplingParams, *, max_len: int = 10_000) -> list[int]:
    """What a request must give, wherever and in however many pieces it runs."""
    output: list[int] = []
    while True:
        token = next_token([*prompt, *output], params.seed)
        output.append(token)
        may_stop = len(output) > params.min_tokens
        if may_stop and (token in params.stop_token_ids or (token == EOS and not params.ignore_eos)):
            return output
        if len(output) >= params.max_tokens or len(prompt) + len(output) >= max_len:
            return output


class FakeStore:
    """Pages of token ids; -1 was never written."""

    def __init__(self, num_blocks: int) -> None:
        self.pages = [[-1] * BLOCK_SIZE for _ in range(num_blocks)]

    def digest(self, block_id: BlockId) -> int:
        return zlib.crc32(repr(self.pages[block_id]).encode())

    def seal(self, block_ids: Sequence[BlockId], generations: Sequence[int]) -> tuple[SealedBlock, ...]:
        return tuple(
            SealedBlock(block_id, generation, self.digest(block_id))
            for block_id, generation in zip(block_ids, generations, strict=True)
        )


class FakeRunner:
    """Writes token ids as KV and samples from what the pages hold."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store
        self.plans: list[StepPlan] = []
        self.during_step: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        self.bad_length = -1
        """A sequence of this many tokens gives logits that are no numbers."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.during_step()
        if self.error is not None:
            raise self.error
        for copy in plan.copies:
            self._store.pages[copy.target] = list(self._store.pages[copy.source])
        written: set[int] = set()
        for chunk in plan.chunks:
            touched = set(self._touched(chunk))
            assert not touched & written, "two chunks write to one page"
            written |= touched
        tokens = {}
        logprobs = {}
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            before = self._read(chunk, chunk.start)
            assert -1 not in before, "a page that was never written is read"
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self._store.pages[chunk.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token
            context = self._read(chunk, end)
            if chunk.prompt_logprobs is not None:
                following = [*context[1:], *([] if chunk.next_token_id is None else [chunk.next_token_id])]
                logprobs[chunk.request_id] = tuple(TokenLogprob(one, -1.0, 1) for one in following[chunk.start :])
            if chunk.samples:
                tokens[chunk.request_id] = tuple(self._sample(spec, context) for spec in chunk.samples)
        return StepResult(tokens=tokens, prompt_logprobs=logprobs)

    def _sample(self, spec: SampleSpec, context: Sequence[int]) -> SampledToken:
        assert context == [*spec.prompt_token_ids, *spec.output_token_ids], "KV of another prefix"
        if len(context) == self.bad_length:
            return SampledToken(token_id=NO_TOKEN)
        token = next_token(context, spec.params.seed)
        logprob = None if spec.params.logprobs is None else TokenLogprob(token, -1.0, 1)
        return SampledToken(token_id=token, logprob=logprob)

    def _touched(self, chunk: Chunk) -> Sequence[int]:
        end = chunk.start + len(chunk.token_ids)
        return list(chunk.block_ids)[chunk.start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]

    def _read(self, chunk: Chunk, end: int) -> list[int]:
        return [self._store.pages[chunk.block_ids[at // BLOCK_SIZE]][at % BLOCK_SIZE] for at in range(end)]


@dataclass
class PendingRead:
    lease: LeaseRef
    attempt: int
    sources: tuple[SealedBlock, ...]
    targets: tuple[BlockId, ...]
    done: Callable[[ReadOutcome], None]


class FakeReader:
    """Does nothing until `run` is called: then one read or confirm happens."""

    def __init__(self, own: FakeStore, sources: Mapping[str, tuple[LeaseKeeper, FakeStore]]) -> None:
        self._own = own
        self._sources = sources
        self.pending: list[PendingRead | Callable[[], None]] = []
        self.num_blocks_read = 0
        self.is_counted = False
        """Reads go through P's begin_read and end_read, as when P serves them itself."""

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        self.pending.append(PendingRead(lease, attempt, tuple(sources), tuple(targets), done))

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        def ask() -> None:
            keeper, _ = self._sources[lease.source_address]
            question = Validate(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, release=True)
            done(keeper.validate(question))

        self.pending.append(ask)

    def close(self) -> None:
        self.pending.clear()

    def run(self, index: int = 0, *, error: str = "", is_damaged: bool = False) -> None:
        work = self.pending.pop(index)
        if isinstance(work, PendingRead):
            work.done(ReadOutcome(error="digest", is_damaged=True) if is_damaged else self._copy(work, error))
        else:
            work()

    def _copy(self, work: PendingRead, error: str) -> ReadOutcome:
        keeper, store = self._sources[work.lease.source_address]
        if self.is_counted:
            asked = ReadBlocks(
                lease_id=work.lease.lease_id,
                incarnation=work.lease.incarnation,
                attempt=work.attempt,
                blocks=work.sources,
            )
            refusal = keeper.begin_read(asked)
            if refusal:
                return ReadOutcome(error=refusal)
        for source, target in zip(work.sources, work.targets, strict=True):
            self._own.pages[target] = list(store.pages[source.block_id])
            if self._own.digest(target) != source.digest:
                error = "digest"
        if self.is_counted:
            keeper.end_read(work.lease.lease_id)
        if not error:
            self.num_blocks_read += len(work.sources)
        return ReadOutcome(error=error, num_bytes=0 if error else len(work.sources) * 100)


def worker_config(role: Role, **scheduler: int | float) -> WorkerConfig:
    defaults: dict[str, int | float] = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    return WorkerConfig(
        role=role, worker_id=f"{role}-0", scheduler=SchedulerConfig(**(defaults | scheduler)), handoff=HandoffConfig()
    )


@dataclass
class Pair:
    """One prefill and one decode worker, and a router that does the least: it forwards and collects."""

    clock: Clock
    prefill: PrefillWorker
    prefill_manager: KVCacheManager
    prefill_runner: FakeRunner
    prefill_store: FakeStore
    decode: DecodeWorker
    decode_manager: KVCacheManager
    decode_runner: FakeRunner
    reader: FakeReader
    streams: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, Tokens] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    num_repeated: int = 0
    kv_events: dict[Role, list[KvChanged | KvSnapshot]] = field(default_factory=lambda: defaultdict(list))
    is_forwarding: bool = True

    def request(
        self, name: str, prompt: Sequence[int], output: Sequence[int] = (), salt: bytes = b"", **params: object
    ) -> GenerationRequest:
        return GenerationRequest(
            request_id=RequestId(name),
            prompt_token_ids=tuple(prompt),
            output_token_ids=tuple(output),
            params=SamplingParams(**params),  # type: ignore[arg-type]
            cache_salt=salt,
        )

    def send(self, request: GenerationRequest, *, attempt: int = 1, deadline_s: float | None = None) -> None:
        """Dispatch over both pools."""
        self.to_prefill(Prefill(request=request, attempt=attempt, deadline_s=deadline_s))
        self.to_decode(Reserve(request=request, attempt=attempt, deadline_s=deadline_s))

    def to_prefill(self, command: Command) -> None:
        self.prefill.handle(command, ROUTER, now=self.clock.now)
        self.collect()

    def to_decode(self, command: Command) -> None:
        self.decode.handle(command, ROUTER, now=self.clock.now)
        self.collect()

    def cancel(self, name: str, attempt: int = 1) -> None:
        command = Cancel(request_id=RequestId(name), attempt=attempt)
        self.to_prefill(command)
        self.to_decode(command)

    def collect(self) -> None:
        for role, worker in ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode)):
            for addressed in worker.take_events():
                self.events.append(addressed.event)
                if isinstance(addressed.event, KvChanged | KvSnapshot):
                    self.kv_events[role].append(addressed.event)
                self._take(addressed.event)

    def _take(self, event: Event) -> None:
        if isinstance(event, BlocksReady):
            if self.is_forwarding and (event.first_token is None or event.first_token.finish_reason is None):
                self.decode.handle(event, ROUTER, now=self.clock.now)
            for first in event.first_tokens:
                self._emit(first)
                if first.finish_reason is not None:
                    self.cancel(first.request_id, first.attempt)
            if event.first_token is not None and not event.first_tokens:
                self._emit(event.first_token)
                if event.first_token.finish_reason is not None:
                    self.cancel(event.request_id, event.attempt)
        elif isinstance(event, Tokens):
            self._emit(event)

    def _emit(self, tokens: Tokens) -> None:
        """The router's fence: only the next index counts. What comes twice must say the same."""
        stream = self.streams.setdefault(tokens.request_id, [])
        end = tokens.index + len(tokens.token_ids)
        if tokens.index < len(stream):
            assert stream[tokens.index : end] == list(tokens.token_ids), "a token came twice and differs"
            self.num_repeated += 1
            return
        assert tokens.index == len(stream), "a token is missing"
        stream += tokens.token_ids
        if tokens.finish_reason is not None:
            self.finished[tokens.request_id] = tokens

    def step_prefill(self) -> bool:
        ran = self.prefill.step(now=self.clock.now)
        self.collect()
        return ran

    def step_decode(self) -> bool:
        ran = self.decode.step(now=self.clock.now)
        self.collect()
        return ran

    def run_reads(self) -> None:
        while self.reader.pending:
            self.reader.run()
            self.collect()

    def pass_time(self, seconds: float, *, heartbeat: bool = True) -> None:
        """Let time go by in both workers; with heartbeats the router lives on (and wants no lease)."""
        self.clock.now += seconds
        for worker in (self.prefill, self.decode):
            if heartbeat:
                worker.handle(Heartbeat(), ROUTER, now=self.clock.now)
            worker.tick(now=self.clock.now)
        self.collect()

    def run(self, *, limit: int = 3000) -> None:
        """Until nothing moves any more."""
        for _ in range(limit):
            moved = self.step_prefill()
            moved = self.step_decode() or moved
            moved = moved or bool(self.reader.pending)
            self.run_reads()
            self.prefill.check()
            self.decode.check()
            if not moved:
                return
        raise AssertionError("no end in sight")

    def nacks(self) -> list[Nack]:
        return [event for event in self.events if isinstance(event, Nack)]

    def assert_kv_events_tell_what_is_cached(self) -> None:
        """A router that applied every KvChanged since the first snapshot knows exactly what is cached."""
        for role, manager in ((Role.PREFILL, self.prefill_manager), (Role.DECODE, self.decode_manager)):
            known: set[BlockKey] = set()
            sequence = 0
            for event in self.kv_events[role]:
                if isinstance(event, KvSnapshot):
                    assert event.sequence == sequence
                    assert {key for path in event.paths for key in path} == known
                    continue
                assert event.sequence == sequence + 1, "a gap"
                sequence = event.sequence
                assert known >= set(event.removed)
                known.difference_update(event.removed)
                for segment in event.stored:
                    assert segment.parent is None or segment.parent in known
                    assert not known & set(segment.keys)
                    known.update(segment.keys)
            assert known == {key for path in manager.snapshot() for key in path}

    def audit(self) -> list[str]:
        """What both workers' ledgers say against themselves."""
        found = []
        for worker in (self.prefill, self.decode):
            worker.handle(LedgerWanted(audit_id=1), ROUTER, now=self.clock.now)
            self.collect()
            (report,) = [event for event in self.events if isinstance(event, LedgerReport)]
            self.events.remove(report)
            found += audit_worker(WorkerId(type(worker).__name__), report.ledger, orphan_limit_s=5.0)
        return [str(finding) for finding in found]

    def assert_nothing_is_held(self) -> None:
        for worker, manager in ((self.prefill, self.prefill_manager), (self.decode, self.decode_manager)):
            worker.check()
            assert worker.is_idle
            assert manager.num_available == manager.num_blocks


def make_pair(
    *,
    num_prefill_blocks: int = 64,
    num_decode_blocks: int = 64,
    max_model_len: int = 10_000,
    prefill: dict[str, int | float] | None = None,
    decode: dict[str, int | float] | None = None,
) -> Pair:
    clock = Clock()
    model = ServedModel(vocab_size=VOCAB_SIZE, max_model_len=max_model_len, eos_token_ids=frozenset({EOS}))
    prefill_store, decode_store = FakeStore(num_prefill_blocks), FakeStore(num_decode_blocks)
    prefill_manager = KVCacheManager(num_blocks=num_prefill_blocks, block_size=BLOCK_SIZE)
    decode_manager = KVCacheManager(num_blocks=num_decode_blocks, block_size=BLOCK_SIZE)
    prefill_runner, decode_runner = FakeRunner(prefill_store), FakeRunner(decode_store)
    lease_ids = count(1)
    prefill_worker = PrefillWorker(
        config=worker_config(Role.PREFILL, **(prefill or {})),
        identity=SourceIdentity(worker_id=WorkerId("p"), incarnation=Incarnation(5), source_address=ADDRESS),
        model=model,
        manager=prefill_manager,
        runner=prefill_runner,
        surroundings=Surroundings(seal=prefill_store.seal, new_lease_id=lambda: LeaseId(next(lease_ids)), clock=clock),
    )
    reader = FakeReader(decode_store, {ADDRESS: (prefill_worker, prefill_store)})
    decode_worker = DecodeWorker(
        config=worker_config(Role.DECODE, **(decode or {})),
        model=model,
        manager=decode_manager,
        runner=decode_runner,
        reader=reader,
        identity=SourceIdentity(worker_id=WorkerId("d"), incarnation=Incarnation(6), source_address="d:1"),
        surroundings=Surroundings(seal=decode_store.seal, new_lease_id=lambda: LeaseId(next(lease_ids)), clock=clock),
    )
    pair = Pair(
        clock=clock,
        prefill=prefill_worker,
        prefill_manager=prefill_manager,
        prefill_runner=prefill_runner,
        prefill_store=prefill_store,
        decode=decode_worker,
        decode_manager=decode_manager,
        decode_runner=decode_runner,
        reader=reader,
    )
    for worker in (prefill_worker, decode_worker):
        worker.open_session(ROUTER, now=clock.now)
    pair.collect()
    return pair

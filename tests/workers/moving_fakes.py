"""Decode workers and a router's transitions without a prefill worker: what a migration needs, and nothing else.

Every prefix is computed where it decodes. Commands and events lie in queues, one per direction and worker, so that a
test says when what arrives.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

from worker_fakes import (
    BLOCK_SIZE,
    EOS,
    ROUTER,
    VOCAB_SIZE,
    Clock,
    FakeReader,
    FakeRunner,
    FakeStore,
    expected_stream,
    worker_config,
)

from duopool.core.audit import audit_worker
from duopool.core.handoff.request import (
    Action,
    Emit,
    Finish,
    Heard,
    Member,
    NeedRoute,
    Phase,
    RequestState,
    Route,
    Routed,
    Send,
    begin,
    transition,
)
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import Command, Event, GenerationRequest, Heartbeat, LedgerReport, LedgerWanted
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import Incarnation, LeaseId, RequestId, Role, WorkerId
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings


@dataclass
class Decoder:
    """One decode worker, and what is under way between it and the router."""

    member: Member
    worker: DecodeWorker
    manager: KVCacheManager
    runner: FakeRunner
    reader: FakeReader
    commands: deque[Command] = field(default_factory=deque)
    events: deque[Event] = field(default_factory=deque)


class Movers:
    """`num` decode workers and a router that sends every request where the test says."""

    def __init__(self, num: int = 2, *, num_blocks: int = 64, is_counted: bool = False, **scheduler: int) -> None:
        self.clock = Clock()
        self.states: dict[RequestId, RequestState] = {}
        self.streams: dict[RequestId, list[int]] = {}
        self.finishes: dict[RequestId, Finish] = {}
        self.homeless: list[RequestId] = []
        """They want a route."""
        sources: dict[str, tuple[DecodeWorker, FakeStore]] = {}
        lease_ids = count(1)
        self.decoders: list[Decoder] = []
        for number in range(num):
            store, manager = FakeStore(num_blocks), KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE)
            member = Member(WorkerId(f"d{number}"), Incarnation(number))
            reader, runner, address = FakeReader(store, sources), FakeRunner(store), f"d{number}:1"
            reader.is_counted = is_counted
            worker = DecodeWorker(
                config=worker_config(Role.DECODE, **scheduler),
                model=ServedModel(vocab_size=VOCAB_SIZE, max_model_len=10_000, eos_token_ids=frozenset({EOS})),
                manager=manager,
                runner=runner,
                reader=reader,
                identity=SourceIdentity(
                    worker_id=member.worker_id, incarnation=member.incarnation, source_address=address
                ),
                surroundings=Surroundings(
                    seal=store.seal, new_lease_id=lambda: LeaseId(next(lease_ids)), clock=self.clock
                ),
            )
            worker.open_session(ROUTER, now=self.clock.now)
            sources[address] = (worker, store)
            self.decoders.append(Decoder(member, worker, manager, runner, reader))

    # ---- the router ----------------------------------------------------------------------------------------------

    def start(self, name: str, prompt: tuple[int, ...], on: int, **params: object) -> None:
        request = GenerationRequest(
            request_id=RequestId(name),
            prompt_token_ids=prompt,
            params=SamplingParams(**params),  # type: ignore[arg-type]
        )
        self.streams[request.request_id] = []
        state, actions = begin(RequestState(request=request))
        self.states[request.request_id] = state
        self._perform(request.request_id, actions)
        self.route(name, on)

    def route(self, name: str, on: int) -> None:
        """Let a request that wants a route decode there."""
        if name in self.homeless:
            self.homeless.remove(RequestId(name))
            self.feed(name, Routed(Route(prefill=None, decode=self.decoders[on].member)))

    def feed(self, name: str, event: object) -> None:
        request_id = RequestId(name)
        self.states[request_id], actions = transition(self.states[request_id], event)  # type: ignore[arg-type]
        self._perform(request_id, actions)

    def _perform(self, request_id: RequestId, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Send(member=member, command=command):
                    self.decoder(member).commands.append(command)
                case Emit(tokens=tokens):
                    assert tokens.index == len(self.streams[request_id])
                    self.streams[request_id] += tokens.token_ids
                case NeedRoute():
                    self.homeless.append(request_id)
                case Finish():
                    assert request_id not in self.finishes
                    self.finishes[request_id] = action

    def decoder(self, member: Member) -> Decoder:
        return next(one for one in self.decoders if one.member == member)

    def home(self, name: str) -> int:
        """Number of the worker whose tokens count."""
        route = self.states[RequestId(name)].route
        assert route is not None
        return self.decoders.index(self.decoder(route.decode))

    # ---- what happens --------------------------------------------------------------------------------------------

    def deliver_command(self, on: int) -> bool:
        decoder = self.decoders[on]
        if not decoder.commands:
            return False
        decoder.worker.handle(decoder.commands.popleft(), ROUTER, now=self.clock.now)
        self._collect(decoder)
        return True

    def deliver_event(self, on: int) -> bool:
        decoder = self.decoders[on]
        if not decoder.events:
            return False
        event = decoder.events.popleft()
        request_id = getattr(event, "request_id", None)
        if request_id in self.states:
            self.feed(request_id, Heard(decoder.member, event))  # type: ignore[arg-type]
        return True

    def step(self, on: int) -> bool:
        decoder = self.decoders[on]
        ran = decoder.worker.step(now=self.clock.now)
        self._collect(decoder)
        return ran

    def read(self, on: int, *, error: str = "") -> bool:
        """One read or confirm of this worker happens."""
        decoder = self.decoders[on]
        if not decoder.reader.pending:
            return False
        decoder.reader.run(error=error)
        for one in self.decoders:
            self._collect(one)
        return True

    def pass_time(self, seconds: float) -> None:
        """Nobody is silent for long: the router's heartbeats come."""
        self.clock.now += seconds
        for decoder in self.decoders:
            decoder.worker.handle(Heartbeat(), ROUTER, now=self.clock.now)
            decoder.worker.tick(now=self.clock.now)
            self._collect(decoder)

    def settle(self, *, steps: bool = True, limit: int = 5000) -> None:
        """Until nothing is under way any more; without `steps` the batches stand still."""
        for _ in range(limit):
            moved = self.turn(steps=steps)
            self.check()
            if not moved:
                return
        raise AssertionError("no end in sight")

    def turn(self, *, steps: bool = True) -> bool:
        """Everything that is under way arrives, and everybody makes a step; False if there was nothing to do."""
        moved = False
        for on in range(len(self.decoders)):
            for act in (self.deliver_command, self.deliver_event, self.read):
                while act(on):
                    moved = True
            moved = (steps and self.step(on)) or moved
        return moved

    def _collect(self, decoder: Decoder) -> None:
        decoder.events += [addressed.event for addressed in decoder.worker.take_events()]

    # ---- laws ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        for decoder in self.decoders:
            decoder.worker.check()
        for request_id, state in self.states.items():
            whole = expected_stream(state.request.prompt_token_ids, state.request.params)
            assert self.streams[request_id] == whole[: len(self.streams[request_id])]
            assert (state.phase is Phase.DONE) == (self.streams[request_id] == whole)

    def audit(self) -> list[str]:
        found = []
        for decoder in self.decoders:
            decoder.worker.handle(LedgerWanted(audit_id=1), ROUTER, now=self.clock.now)
            self._collect(decoder)
            (report,) = [event for event in decoder.events if isinstance(event, LedgerReport)]
            decoder.events.remove(report)
            found += audit_worker(decoder.member.worker_id, report.ledger, orphan_limit_s=5.0)
        return [str(finding) for finding in found]

    def assert_nothing_is_held(self) -> None:
        for decoder in self.decoders:
            decoder.worker.check()
            assert decoder.worker.is_idle
            assert decoder.manager.num_available == decoder.manager.num_blocks

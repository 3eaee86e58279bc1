"""`make corrupt`: pages are damaged on their way from P to D, thousands of times, and no token may show it.

Production from the prefill worker's seal over source, wire, reader, digest, slot and validate to the decode worker's
batch, and the router's transitions, which try again. In place of the model stands one whose next token is a function of
what the pages hold. A read that arrives damaged is made once more; damaged again, the handoff is given up and the
request is prefilled anew; the third attempt is left in peace, so the retries that a request has suffice.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

sys.path += [str(Path(__file__).parents[1] / "workers")]

from damage import (
    ByteStore,
    Damage,
    ReadKey,
    SabotagedClient,
    Saboteur,
    WatchedReader,
    sabotaged_agent,
    sabotaged_copy,
)
from grpc import aio
from worker_fakes import BLOCK_SIZE, EOS, ROUTER, FakeRunner, expected_stream, worker_config

from duopool.core.handoff.request import (
    Action,
    Emit,
    Finish,
    Heard,
    Member,
    NeedRoute,
    Phase,
    RequestEvent,
    RequestState,
    Route,
    Routed,
    Send,
    begin,
    transition,
)
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import Accepted, BlocksReady, GenerationRequest, Joined, Nack, Reserved, Tokens
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, Role, WorkerId
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import available_transports, make_nixl_source
from duopool.engine.transfer.grpc_reader import GrpcReader
from duopool.engine.transfer.grpc_source import add_kv_source
from duopool.engine.transfer.source_client import SourceClient
from duopool.engine.transfer.transport import BlockReader
from duopool.prefill_worker.worker import PrefillWorker
from duopool.proto.codec import INTERNAL_SERVER_OPTIONS

NUM_BLOCKS = 128
NUM_AT_ONCE = 6
PATIENCE_S = 60.0
NEVER = 100.0
"""The workers' clock stands still: this is not about time."""


class Runner(FakeRunner):
    """Samples from token ids that are numpy's."""

    def _read(self, chunk: Chunk, end: int) -> list[int]:
        return [int(token) for token in super()._read(chunk, end)]


@dataclass
class Request:
    state: RequestState
    stream: list[int]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of it all."""

    transport: str
    num_requests: int
    num_wrong: int
    """Requests whose stream is not what it must be, or that failed."""
    saboteur: Saboteur
    seconds: float

    @property
    def num_faults(self) -> int:
        return self.saboteur.num_done.total()

    @property
    def is_good(self) -> bool:
        return not self.num_wrong and not self.saboteur.num_missed.total() and not self.saboteur.num_false_alarms

    def report(self) -> str:
        saboteur = self.saboteur
        kinds = ", ".join(f"{saboteur.num_done[kind]} {kind}" for kind in Damage)
        return (
            f"{self.transport}: {self.num_faults} faults in {saboteur.num_reads} reads ({kinds}): "
            f"{saboteur.num_missed.total()} not detected, {saboteur.num_false_alarms} false alarms; "
            f"{self.num_requests} requests, {self.num_wrong} wrong or failed; {self.seconds:.1f} s"
        )


class Bed:
    """One prefill and one decode worker with a real wire, and a router that does what the transitions say."""

    def __init__(self, transport: str, *, rate: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._wake = threading.Event()
        self._requests: dict[RequestId, Request] = {}
        prefill_pages = ByteStore(NUM_BLOCKS, tokens_per_page=BLOCK_SIZE, seed=seed)
        decode_pages = ByteStore(NUM_BLOCKS, tokens_per_page=BLOCK_SIZE, seed=seed + 1)
        self.saboteur = Saboteur(prefill_pages, rate=rate, seed=seed)
        keeper = SimpleNamespace()
        agent = make_nixl_source(
            "nixl" if transport == "nixl" else "grpc",
            prefill_pages,
            worker_id=WorkerId("p"),
            incarnation=Incarnation(5),
        )
        address, self._stop = _serve(
            lambda server: add_kv_source(
                server, keeper=keeper, store=prefill_pages, incarnation=Incarnation(5), nixl=agent
            )
        )
        self._agent = agent
        reads: dict[tuple[BlockId, ...], ReadKey] = {}
        reader: BlockReader
        if agent is not None:
            from duopool.engine.transfer.nixl_reader import NixlReader

            reader = NixlReader(
                decode_pages,
                worker_id=WorkerId("d"),
                incarnation=Incarnation(6),
                client=SourceClient(confirm_timeout_s=2.0),
                make_agent=sabotaged_agent(self.saboteur, reads),
            )
        else:
            client = SabotagedClient(self.saboteur)
            reader = GrpcReader(decode_pages, client=client)
            if transport == "shared_memory":
                from duopool.engine.transfer.shared_memory_reader import SharedMemoryReader

                copy_pages = sabotaged_copy(self.saboteur, reads)
                reader = SharedMemoryReader(decode_pages, client=client, others=reader, copy_pages=copy_pages)
        self.reader = WatchedReader(reader, self.saboteur, reads, last_hit_attempt=2)
        model = ServedModel(vocab_size=1 << 30, max_model_len=10_000, eos_token_ids=frozenset({EOS}))
        lease_ids = count(1)
        self.managers = [KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE) for _ in range(2)]
        surroundings = [
            Surroundings(seal=partial(seal, pages), new_lease_id=lambda: LeaseId(next(lease_ids)), clock=lambda: NEVER)
            for pages in (prefill_pages, decode_pages)
        ]
        self.prefill = PrefillWorker(
            config=worker_config(Role.PREFILL),
            identity=SourceIdentity(worker_id=WorkerId("p"), incarnation=Incarnation(5), source_address=address),
            model=model,
            manager=self.managers[0],
            runner=Runner(prefill_pages),  # type: ignore[arg-type]
            surroundings=surroundings[0],
        )
        self.decode = DecodeWorker(
            config=worker_config(Role.DECODE),
            model=model,
            manager=self.managers[1],
            runner=Runner(decode_pages),  # type: ignore[arg-type]
            reader=self.reader,
            identity=SourceIdentity(worker_id=WorkerId("d"), incarnation=Incarnation(6), source_address="d:1"),
            surroundings=surroundings[1],
        )
        self._workers = {WorkerId("p"): self.prefill, WorkerId("d"): self.decode}
        self._members = {WorkerId("p"): Member(WorkerId("p"), Incarnation(5))}
        self._members[WorkerId("d")] = Member(WorkerId("d"), Incarnation(6))
        keeper.begin_read, keeper.end_read = self.prefill.begin_read, self.prefill.end_read
        keeper.validate = self.prefill.validate
        for worker in self._workers.values():
            worker.on_change = self._wake.set
            worker.open_session(ROUTER, now=NEVER)

    def close(self) -> None:
        """End all threads."""
        self.reader.close()
        self._stop()
        if self._agent is not None:
            self._agent.close()

    def check(self) -> None:
        """Nothing is held anywhere."""
        for worker, manager in zip(self._workers.values(), self.managers, strict=True):
            worker.check()
            assert worker.is_idle
            assert manager.num_available == manager.num_blocks

    def settle(self) -> None:
        """Reads of attempts that were given up come to their end."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not all(worker.is_idle for worker in self._workers.values()):
            self._wake.clear()
            if not self._forward():
                self._wake.wait(0.05)
            assert time.monotonic() < give_up_at, "no end in sight"

    def run_some(self, names: Sequence[str]) -> int:
        """Run these requests side by side; how many went wrong."""
        for name in names:
            prompt = tuple(self._random.randrange(1 << 20) for _ in range(self._random.randint(4, 30)))
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            request = GenerationRequest(request_id=RequestId(name), prompt_token_ids=prompt, params=params)
            self._requests[RequestId(name)] = Request(RequestState(request=request), [])
            self._take(RequestId(name), begin(self._requests[RequestId(name)].state))
        give_up_at = time.monotonic() + PATIENCE_S
        while not all(one.state.phase.is_final for one in self._requests.values()):
            self._wake.clear()
            moved = self.prefill.step(now=NEVER)
            moved = self.decode.step(now=NEVER) or moved
            if not self._forward() and not moved:
                self._wake.wait(0.05)
            assert time.monotonic() < give_up_at, "no end in sight"
        done, self._requests = self._requests, {}
        return sum(
            one.state.phase is not Phase.DONE
            or one.stream != expected_stream(one.state.request.prompt_token_ids, one.state.request.params)
            for one in done.values()
        )

    def _forward(self) -> bool:
        """Give the workers' messages to their requests; whether there were any."""
        was_any = False
        for worker_id, worker in self._workers.items():
            for addressed in worker.take_events():
                message = addressed.event
                if not isinstance(message, Accepted | BlocksReady | Reserved | Joined | Tokens | Nack):
                    continue
                was_any = True
                if message.request_id in self._requests:
                    self._feed(message.request_id, Heard(self._members[worker_id], message))
        return was_any

    def _feed(self, request_id: RequestId, event: RequestEvent) -> None:
        self._take(request_id, transition(self._requests[request_id].state, event))

    def _take(self, request_id: RequestId, step: tuple[RequestState, tuple[Action, ...]]) -> None:
        request = self._requests[request_id]
        request.state, actions = step
        for action in actions:
            match action:
                case Send(member=member, command=command):
                    self._workers[member.worker_id].handle(command, ROUTER, now=NEVER)
                case Emit(tokens=tokens):
                    request.stream += tokens.token_ids
                case NeedRoute():
                    route = Route(prefill=self._members[WorkerId("p")], decode=self._members[WorkerId("d")])
                    self._feed(request_id, Routed(route))
                case Finish():
                    pass


def _serve(add: Callable[[aio.Server], None]) -> tuple[str, Callable[[], None]]:
    """A gRPC server on a thread of its own: its address, and how to stop it."""
    loop, started, ports = asyncio.new_event_loop(), threading.Event(), list[int]()
    ended = asyncio.Event()

    async def serve() -> None:
        server = aio.server(options=INTERNAL_SERVER_OPTIONS)
        add(server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        started.set()
        await ended.wait()
        await server.stop(None)
        if calls := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(calls, timeout=1)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="source")
    thread.start()
    assert started.wait(20)

    def stop() -> None:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
        loop.close()

    return f"127.0.0.1:{ports[0]}", stop


def corrupt(transport: str, *, num_faults: int, rate: float = 0.5, seed: int = 0) -> Result:
    """Serve requests until so many faults were put in."""
    began_at, num_requests, num_wrong = time.monotonic(), 0, 0
    bed = Bed(transport, rate=rate, seed=seed)
    try:
        while bed.saboteur.num_done.total() < num_faults:
            names = [f"{num_requests + n:032x}" for n in range(NUM_AT_ONCE)]
            num_wrong += bed.run_some(names)
            num_requests += len(names)
        bed.settle()
        bed.check()
    finally:
        bed.close()
    return Result(transport, num_requests, num_wrong, bed.saboteur, time.monotonic() - began_at)


def main() -> int:
    """Half of the faults over every transport that is here; 1 if any came through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000, help="how many, over all transports")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transports = available_transports()
    is_good = True
    for transport in transports:
        result = corrupt(transport, num_faults=-(-options.faults // len(transports)), seed=options.seed)
        print(result.report(), flush=True)
        is_good = is_good and result.is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

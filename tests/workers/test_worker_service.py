"""The shell around a worker: sessions over real gRPC, the step loop's thread, the heartbeat."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import grpc
import pytest
from worker_fakes import (
    ADDRESS,
    BLOCK_SIZE,
    EOS,
    VOCAB_SIZE,
    FakeRunner,
    FakeStore,
    expected_stream,
    make_pair,
    worker_config,
)

from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import (
    BlocksReady,
    CommandBatch,
    Event,
    GenerationRequest,
    KvSnapshot,
    Nack,
    NackReason,
    Prefill,
    SnapshotWanted,
    WorkerLoad,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import Incarnation, LeaseId, RequestId, Role, WorkerId
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.step_loop import StepLoop
from duopool.prefill_worker.worker import PrefillWorker, Surroundings
from duopool.proto import codec
from duopool.proto.internal_access import InternalAccess
from duopool.proto.server_thread import ServerThread
from duopool.proto.worker_service import WorkerService

INCARNATION = Incarnation(77)
ACCESS = InternalAccess(credential="a credential for tests")


class Served:
    """A prefill worker behind its service, on a real port."""

    def __init__(self) -> None:
        store = FakeStore(32)
        self.runner = FakeRunner(store)
        lease_ids = count(1)
        self.worker = PrefillWorker(
            config=worker_config(Role.PREFILL),
            identity=SourceIdentity(worker_id=WorkerId("p"), incarnation=INCARNATION, source_address=ADDRESS),
            model=ServedModel(vocab_size=VOCAB_SIZE, max_model_len=1000, eos_token_ids=frozenset({EOS})),
            manager=KVCacheManager(num_blocks=32, block_size=BLOCK_SIZE),
            runner=self.runner,
            surroundings=Surroundings(
                seal=store.seal, new_lease_id=lambda: LeaseId(next(lease_ids)), clock=time.monotonic
            ),
        )
        self.fatal: list[Exception] = []
        self.died = threading.Event()
        self.steps = StepLoop(self.worker, flush=self._flush, on_fatal=self._on_fatal)
        self.service = WorkerService(
            self.worker, incarnation=INCARNATION, heartbeat_s=0.05, on_commands=self.steps.wake
        )
        self.server = ServerThread(ACCESS)
        self.address = self.server.listen("127.0.0.1")
        self.server.serve(self.service.add_to, self.service.beat)
        self.steps.start()

    def stop(self) -> None:
        self.steps.stop()
        self.server.stop()

    def _flush(self) -> None:
        self.service.flush()

    def _on_fatal(self, error: Exception) -> None:
        self.fatal.append(error)
        self.died.set()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


class Client:
    """A router's end of a session."""

    def __init__(self, served: Served, incarnation: int = INCARNATION) -> None:
        self._channel = grpc.aio.insecure_channel(served.address)
        method = self._channel.stream_stream(
            codec.SESSION_METHOD, request_serializer=None, response_deserializer=codec.decode_report
        )
        self.call = method(metadata=(("incarnation", str(incarnation)), *ACCESS.metadata))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, *commands: object) -> None:
        await self.call.write(codec.encode(CommandBatch(commands=commands)))  # type: ignore[arg-type]

    async def ending(self) -> grpc.StatusCode:
        """How the session ends; the status comes behind what was not read."""
        with suppress(grpc.RpcError):
            while await asyncio.wait_for(self.call.read(), 20) is not grpc.aio.EOF:
                pass
        return await self.call.code()

    async def until(self, kind: type[Event]) -> list[Event]:
        """Read reports until one holds an event of this kind."""
        seen: list[Event] = []
        while not any(isinstance(event, kind) for event in seen):
            report = await asyncio.wait_for(self.call.read(), 20)
            assert report is not grpc.aio.EOF
            assert report.events, "an empty message was sent"
            seen += report.events
        return seen


def prefill(name: str, prompt: list[int]) -> Prefill:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    request = GenerationRequest(request_id=RequestId(name), prompt_token_ids=tuple(prompt), params=params)
    return Prefill(request=request, attempt=1)


async def read_ready(client: Client) -> list[BlocksReady]:
    """All that is listed until the first token."""
    ready: list[BlocksReady] = []
    while not ready or ready[-1].first_token is None:
        ready += [event for event in await client.until(BlocksReady) if isinstance(event, BlocksReady)]
    return ready


def test_a_session_begins_with_a_snapshot_and_carries_a_prefill(served: Served) -> None:
    async def talk() -> None:
        async with Client(served) as client:
            opening = await client.until(WorkerLoad)
            assert isinstance(opening[0], KvSnapshot)
            command = prefill("r0", [1] * 9)
            await client.send(command)
            first = (await read_ready(client))[-1].first_token
            assert first is not None
            assert list(first.token_ids) == expected_stream([1] * 9, command.request.params)[:1]

    asyncio.run(talk())
    served.worker.check()


def test_two_routers_hear_only_their_own_requests_and_both_hear_of_the_cache(served: Served) -> None:
    async def talk() -> None:
        async with Client(served) as one, Client(served) as other:
            await one.until(KvSnapshot)
            await other.until(KvSnapshot)
            await asyncio.gather(one.send(prefill("a", [1] * 9)), other.send(prefill("b", [2] * 9)))
            names = [{event.request_id for event in await read_ready(client)} for client in (one, other)]
            assert names == [{"a"}, {"b"}]
            async with Client(served) as late:
                await late.send(SnapshotWanted())
                snapshots = [event for event in await late.until(KvSnapshot) if isinstance(event, KvSnapshot)]
                assert {len(path) for path in snapshots[-1].paths} == {2}

    asyncio.run(talk())


def test_load_comes_and_commands_are_taken_while_a_step_runs(served: Served) -> None:
    release, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        release.wait(20)

    served.runner.during_step = block

    async def talk() -> None:
        async with Client(served) as client:
            await client.until(KvSnapshot)
            await client.send(prefill("a", [1] * 9))
            await asyncio.to_thread(entered.wait, 20)
            await client.send(prefill("b", [2] * 9))
            while True:
                loads = [event for event in await client.until(WorkerLoad) if isinstance(event, WorkerLoad)]
                if loads[-1].num_waiting == 1:  # "b" was taken in, and no step has ended
                    assert loads[-1].num_steps == 0
                    break
            release.set()
            await read_ready(client)

    try:
        asyncio.run(talk())
    finally:
        release.set()


@pytest.mark.parametrize("incarnation", [INCARNATION + 1, -1])
def test_a_session_for_another_life_is_refused(served: Served, incarnation: int) -> None:
    async def talk() -> grpc.StatusCode:
        async with Client(served, incarnation) as client:
            return await client.call.code()

    assert asyncio.run(talk()) is grpc.StatusCode.FAILED_PRECONDITION


def test_what_is_no_command_batch_ends_the_session_and_nothing_else(served: Served) -> None:
    async def talk() -> grpc.StatusCode:
        async with Client(served) as bad, Client(served) as good:
            await bad.until(KvSnapshot)
            await bad.call.write(b"not msgpack")
            code = await bad.ending()
            await good.send(prefill("a", [1] * 9))
            await read_ready(good)
            return code

    assert asyncio.run(talk()) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_that_is_too_large_ends_its_session_unread_and_nothing_else(served: Served) -> None:
    async def talk() -> grpc.StatusCode:
        async with Client(served) as bad, Client(served) as good:
            await bad.until(KvSnapshot)
            await bad.call.write(bytes(codec.MAX_COMMANDS_BYTES + 1))
            code = await bad.ending()
            await good.send(prefill("a", [1] * 9))
            await read_ready(good)
            return code

    assert asyncio.run(talk()) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("num_commands", [1, 2, 7, 32])
@pytest.mark.parametrize("max_bytes", [1, 200, 1000, 1 << 20])
def test_commands_travel_in_messages_that_can_be_read_whole_and_in_order(num_commands: int, max_bytes: int) -> None:
    commands = tuple(prefill(f"r{at}", [at] * at) for at in range(num_commands))
    messages = list(codec.encode_commands(CommandBatch(commands=commands), max_bytes=max_bytes))
    batches = [codec.decode_commands(data).commands for data in messages]
    assert sum(batches, ()) == commands
    assert all(len(data) <= max_bytes or len(batch) == 1 for data, batch in zip(messages, batches, strict=True))


def test_a_router_that_ends_its_half_ends_the_session(served: Served) -> None:
    async def talk() -> grpc.StatusCode:
        async with Client(served) as client:
            await client.until(KvSnapshot)
            await client.call.done_writing()
            return await client.call.code()

    assert asyncio.run(talk()) is grpc.StatusCode.OK


def test_a_failing_step_is_told_and_fatal(served: Served) -> None:
    served.runner.error = RuntimeError("broken engine")

    async def talk() -> list[Event]:
        async with Client(served) as client:
            await client.send(prefill("a", [1] * 9))
            return await client.until(Nack)

    nack = next(event for event in asyncio.run(talk()) if isinstance(event, Nack))
    assert nack.reason is NackReason.INTERNAL
    assert served.died.wait(20)
    assert served.fatal == [served.runner.error]


def test_steps_stand_behind_what_ray_has_niced_already() -> None:
    """A joined Ray nices its workers; only root could take that back, and a step thread that tried would be dead."""
    seen: list[int] = []
    stepped = threading.Event()

    def look() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        stepped.set()

    def host() -> None:
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + 7)  # threads inherit it
        seen.append(os.getpriority(os.PRIO_PROCESS, own))
        steps = StepLoop(make_pair().prefill, flush=look, on_fatal=lambda _: None, niceness=4)
        steps.start()
        stepped.wait(20)
        steps.stop()

    thread = threading.Thread(target=host)
    thread.start()
    thread.join()
    assert seen[1] == min(19, seen[0] + 4)
